"""Calibration: batches of token rows, and hooks that turn a pass over them into statistics per module.

Everything here works on any ``nn.Module`` and leaves it as it was found: no hooks, same train/eval flags, same
``requires_grad``, also after an exception. Padding never counts. Modules that read the same tensor (q/k/v, gate/up)
share one reduction.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.stats import second_moment_sum, spans_of


IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Right-padded token rows; ``labels`` holds -100 where no loss is taken. All of shape (samples, tokens)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def make_batches(rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int, pad_id: int) -> list[Batch]:
    """Group rows of similar length, longest first (an out-of-memory shows at once), and pad on the right.

    Args:
        rows: each with ``input_ids`` and ``labels`` of equal length.
        batch_size: samples per batch.
        pad_id: token put where a row is shorter; it never counts.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    picked = [[rows[index] for index in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return [_pad(group, pad_id) for group in picked]


def _pad(group: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> Batch:
    width = max(len(row["input_ids"]) for row in group)

    def column(key: str, fill: int) -> Tensor:
        return torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in group])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in group])
    return Batch(column("input_ids", pad_id), mask, column("labels", IGNORE_INDEX))


class Measurement(Protocol):
    """An expensive pass over model and data. Methods with the same ``key`` share one pass and one cached result."""

    @property
    def key(self) -> str:
        """Names the measurement and every option that changes its result."""

    @property
    def backward(self) -> bool:
        """Whether it needs gradients."""

    def __call__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """Return one CPU tensor per module name."""


@dataclass(frozen=True)
class InputSecondMoments:
    """Mean over calibration tokens of each module's squared inputs: ``lambda_j = mean_t w_t x_tj^2``.

    This is diag(H) of the layer's reconstruction Hessian ``H = X X^T`` up to a factor (Sensitivity-LoRA, Eq. 2-7).

    Attributes:
        weighting: ``none`` sets ``w_t = 1`` (the paper; forward passes only). ``gradient`` sets ``w_t = |g_t|^2``,
            the squared norm of the summed loss's gradient at the module's output: the row-summed empirical Fisher
            diagonal, which also tells modules apart that read the same input. It holds every target's input in memory
            until the backward pass reaches it.

    Cost: one forward (and backward) pass; memory, beyond the pass, one vector per module.
    """

    weighting: str = "none"

    @property
    def key(self) -> str:
        """Identity in the statistics cache."""
        return f"input_second_moments/weighting={self.weighting}"

    @property
    def backward(self) -> bool:
        """Gradient weighting needs a backward pass."""
        return self.weighting == "gradient"

    def __call__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Batch]
    ) -> dict[str, Tensor]:
        """One fp64 vector of length ``in_features`` per module.

        Raises:
            CalibrationError: a module saw no token, a routed input cannot be matched with the padding mask, or a
                statistic is not finite.
        """
        collector = _MomentCollector(modules, self.backward)
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            for handle in collector.attach():
                stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad() if self.backward else torch.no_grad())
            for batch in tqdm(batches, desc="Scoring modules", unit="batch"):
                collector.start(batch)
                (_backward_pass if self.backward else _forward_pass)(model, modules, batch)
        return collector.means()


class _MomentCollector:
    """The state behind InputSecondMoments: running sums, and the last input seen with its reduction."""

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
        """Hook every module; the caller removes the handles."""
        for name, module in self.modules.items():
            yield module.register_forward_hook(self._hook(name))

    def start(self, batch: Batch) -> None:
        """Take over the padding mask of the batch about to be run."""
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
        """Sums over tokens divided by the number of tokens, in module order, on the CPU."""
        unseen = [name for name in self.modules if name not in self.sums]
        if unseen:
            raise CalibrationError(
                f"{len(unseen)} of {len(self.modules)} target modules saw no calibration token, for example "
                f"{unseen[0]}; raise adaptive_calibration_samples or take the module out of lora_target"
            )
        means = {name: (self.sums[name] / self.tokens).cpu() for name in self.modules}
        for name, value in means.items():
            if not bool(torch.isfinite(value).all()):
                raise CalibrationError(
                    f"the inputs of {name} contain NaN or infinity: check the base model and its dtype (bf16 "
                    "instead of fp16)"
                )
        return means


def _forward_pass(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> None:
    """Run the model; without its output head unless that head is a target, since nobody reads the logits."""
    body = getattr(model, "base_model", model)
    targets = set(map(id, modules.values()))
    if not targets <= set(map(id, body.modules())):
        body = model
    body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def _backward_pass(model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch) -> None:
    """Back-propagate the next-token loss, summed (not averaged) so that the split into batches does not matter."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    loss = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    loss.backward()  # type: ignore[no-untyped-call]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with all parameters frozen; every flag comes back as it was."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter in trainable:
            parameter.requires_grad_(True)


def count_tokens(batches: Iterable[Batch]) -> int:
    """Tokens that count, padding left out."""
    return int(sum(int(batch.attention_mask.sum()) for batch in batches))
