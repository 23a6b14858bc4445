"""Hooks that turn a pass over batches of token rows into statistics of each module's inputs.

Everything here works on any ``nn.Module`` that is called as transformers' decoders are, or by a given ``forward``, and
leaves it as it was found: no hooks, same train/eval flags, same ``requires_grad``, also after an exception. Padding
never counts. Modules that read the same tensor (q/k/v, gate/up) share one reduction.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llamafactory_adaptive.accelerator import widest_float
from llamafactory_adaptive.calibration.batches import IGNORE_INDEX, Batch
from llamafactory_adaptive.calibration.measurement import Forward, evaluating
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.progress import watched


# Rows are reduced in pieces of about this many elements: small enough to stay in a CPU's cache (a whole activation in
# fp32 costs 10 x more there, in page faults), large enough to keep a GPU busy, and never a second copy of the input.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 24}


def second_moment_sum(
    x_TN: Tensor, spans: Sequence[tuple[int, int]] | None = None, weights_T: Tensor | None = None
) -> Tensor:
    """Compute ``sum_t w_t * x_tj^2``, in fp32 chunks of rows that are accumulated in the widest float of the device.

    Args:
        x_TN: activations, any float dtype.
        spans: half-open ranges of the rows to sum (padding left out); all rows when None. Ranges are read in place;
            selecting rows by index would copy them.
        weights_T: non-negative weight per row of ``x_TN``; 1 when None.

    Returns:
        fp64 vector of length N on the device of ``x_TN``; fp32 where that has no fp64 (MPS).
    """
    tokens, features = x_TN.shape
    chunk = max(1, _CHUNK_ELEMENTS.get(x_TN.device.type, _CHUNK_ELEMENTS["other"]) // features)
    total_N = torch.zeros(features, dtype=widest_float(x_TN.device), device=x_TN.device)
    for begin, end in spans if spans is not None else [(0, tokens)]:
        for start in range(begin, end, chunk):
            picked = slice(start, min(start + chunk, end))
            squared = x_TN[picked].to(torch.float32, copy=True).square_()
            total_N += squared.sum(0) if weights_T is None else weights_T[picked].to(torch.float32) @ squared
    return total_N


def spans_of(mask_T: Tensor) -> list[tuple[int, int]]:
    """Find the half-open ranges of consecutive positive entries."""
    edges = torch.diff((mask_T > 0).to(torch.int8), prepend=mask_T.new_zeros(1), append=mask_T.new_zeros(1))
    starts, ends = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


@dataclass(frozen=True)
class InputSecondMoments:
    """Mean over calibration tokens of each module's squared inputs: ``lambda_j = mean_t w_t x_tj^2``.

    This is diag(H) of the layer's reconstruction Hessian ``H = X X^T`` up to a factor (Sensitivity-LoRA, Eq. 2-7).

    Attributes:
        weighting: ``none`` sets ``w_t = 1`` (the paper; forward passes only). ``gradient`` sets ``w_t = |g_t|^2``,
            the squared norm of the summed loss's gradient at the module's output: the row-summed empirical Fisher
            diagonal, which differs also between modules that read the same input. It holds every target's input in
            memory until the backward pass reaches it.

    Cost: one forward (and backward) pass; memory, beyond the pass, one vector per module.
    """

    weighting: str = "none"

    @property
    def key(self) -> str:
        """Return the key of this measurement in the statistics cache."""
        return f"input_second_moments/weighting={self.weighting}"

    @property
    def backward(self) -> bool:
        """Tell whether a backward pass is needed, as gradient weighting does."""
        return self.weighting == "gradient"

    def __call__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """Measure an fp64 vector of length ``in_features`` per module; ``forward`` replaces the model's own call.

        Raises:
            CalibrationError: a module received no token, a routed input cannot be matched with the padding mask, or a
                statistic is not finite.
        """
        collector = _MomentCollector(modules, self.backward)
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            for handle in collector.attach():
                stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad() if self.backward else torch.no_grad())
            for batch in watched(batches, "Scoring modules"):
                collector.start(batch)
                if self.backward:
                    back_propagate(model, batch, forward or decoder_forward)
                elif forward is not None:
                    forward(model, batch)
                else:
                    forward_to_targets(model, modules, batch)
        return collector.means()


class _MomentCollector:
    """State of one InputSecondMoments pass: running sums, and the last input with its reduction."""

    def __init__(self, modules: Mapping[str, nn.Module], weighted: bool) -> None:
        self.modules = modules
        self.weighted = weighted
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        self._spans: list[tuple[int, int]] | None = None
        self._cells = 0
        # A weak reference: holding the last input would keep its memory from being used again by the next layer.
        self._last: tuple[weakref.ref[Tensor], Tensor] | None = None

    def attach(self) -> Iterator[Any]:
        """Register a forward hook on every module; the caller removes the handles."""
        for name, module in self.modules.items():
            yield module.register_forward_hook(self._hook(name))

    def start(self, batch: Batch) -> None:
        """Store the padding mask of the batch that runs next."""
        spans = spans_of(batch.attention_mask.flatten())
        counted = sum(end - start for start, end in spans)
        self._cells, self._last = batch.attention_mask.numel(), None
        self._spans = None if counted == self._cells else spans
        self.tokens += counted

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if self.weighted:
                self._wait_for_gradient(name, inputs[0], output)
            else:
                self._add(name, self._shared_sum(name, inputs[0]))

        return hook

    def _wait_for_gradient(self, name: str, x: Tensor, output: Tensor) -> None:
        if not output.requires_grad:  # a frozen base: the graph begins at the first target
            output.requires_grad_(True)
        x = x.detach()

        def arrived(gradient: Tensor) -> None:
            weights_T = self._flat(name, gradient).float().square().sum(-1)
            self._add(name, second_moment_sum(self._flat(name, x), self._spans, weights_T))

        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _shared_sum(self, name: str, x: Tensor) -> Tensor:
        if self._last is None or self._last[0]() is not x:
            self._last = (weakref.ref(x), second_moment_sum(self._flat(name, x), self._spans))
        return self._last[1]

    def _flat(self, name: str, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if self._spans is not None and len(flat) != self._cells:
            raise CalibrationError(
                f"{name} reads {len(flat)} rows where the batch has {self._cells} tokens (a routed expert?), so "
                "padding cannot be told apart; set adaptive_calibration_batch_size: 1"
            )
        return flat

    def _add(self, name: str, increment: Tensor) -> None:
        self.sums[name] = self.sums[name] + increment if name in self.sums else increment

    def means(self) -> dict[str, Tensor]:
        """Divide the sums over tokens by the number of tokens; in module order, on the CPU."""
        unseen = [name for name in self.modules if name not in self.sums]
        if unseen:
            raise CalibrationError(
                f"{len(unseen)} of {len(self.modules)} target modules saw no calibration token, for example "
                f"{unseen[0]}; raise adaptive_calibration_samples or take the module out of lora_target"
            )
        means = {name: (self.sums[name] / self.tokens).cpu().double() for name in self.modules}
        for name, value in means.items():
            if not bool(torch.isfinite(value).all()):
                raise CalibrationError(
                    f"the inputs of {name} contain NaN or infinity: check the base model and its dtype (bf16 "
                    "instead of fp16)"
                )
        return means


def forward_to_targets(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> None:
    """Run the model on a batch; its output head is left out unless it is a target, since the logits are not used."""
    body = getattr(model, "base_model", model)
    targets = set(map(id, modules.values()))
    if not targets <= set(map(id, body.modules())):
        body = model
    decoder_forward(body, batch)


def decoder_forward(model: nn.Module, batch: Batch) -> Any:
    """Call a model with the arguments of transformers' decoders."""
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def back_propagate(model: nn.Module, batch: Batch, forward: Forward) -> None:
    """Back-propagate the next-token loss, summed and not averaged, so that the split into batches does not matter."""
    output = forward(model, batch)
    logits: Any = getattr(output, "logits", output)
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch.labels[:, 1:].flatten().to(logits.device),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    loss.backward()  # type: ignore[no-untyped-call]
