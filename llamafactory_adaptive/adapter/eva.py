"""What EVA starts LoRA from (arXiv 2410.07170): the directions in which a module's inputs vary most, computed by PEFT.

    A = the first r right-singular vectors of the module's inputs over tokens of the calibration data, centred
    B = 0                                                                        (Section 3)

PEFT computes them incrementally, batch by batch, until each vector's cosine with the one before reaches ``tau``, its
0.99. EVA's ranks by explained variance are left out: vectors are computed at the largest rank of the plan, and each
module takes as many as its rank. Tokens of prompts and padding do not count; PEFT up to 0.19.1 does not see its own
label mask, so they are picked here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import Tensor, nn

from llamafactory_adaptive.calibration.batches import IGNORE_INDEX, Batch
from llamafactory_adaptive.calibration.input_moments import forward_to_targets
from llamafactory_adaptive.calibration.measurement import Forward, evaluating
from llamafactory_adaptive.errors import CalibrationError, first_of
from llamafactory_adaptive.versions import installed_versions


# PEFT goes over the batches again and again until the vectors have settled, which some never do.
_MOST_PASSES, _MOST_BATCHES = 20, 200


@dataclass(frozen=True)
class InputDirections:
    """The first right-singular vectors of each module's inputs, at most ``rank``; a tensor (rank, in_features) each.

    Cost: forward passes over the batches until the vectors have settled, and a singular value decomposition per batch
    and distinct input.
    """

    rank: int

    @property
    def key(self) -> str:
        """Return the key of this measurement, with the version of PEFT, whose numbers these are."""
        return f"eva/rank={self.rank}/peft={installed_versions(('peft',))['peft']}"

    @property
    def backward(self) -> bool:
        """Return False: inputs alone are looked at."""
        return False

    def __call__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """Compute the vectors of every module, those with the largest singular values first, fp32 on the CPU.

        Raises:
            CalibrationError: no batch has enough tokens, a module does not read one input per token, its inputs are
                not finite, or the vectors do not settle.
        """
        ranks: dict[str, int] = {name: min(self.rank, int(m.in_features)) for name, m in modules.items()}  # type: ignore[arg-type]
        used = _batches_with(max(ranks.values()), batches)
        run = forward or (lambda whole, batch: forward_to_targets(whole, modules, batch))
        with evaluating(model), _hooks_restored(model), torch.no_grad():
            _check_inputs(modules, used[0], lambda: run(model, used[0]))
            found = get_eva_state_dict(
                model,
                used,
                _config(ranks, self.rank),
                forward_fn=_limited(run, max(_MOST_PASSES * len(used), _MOST_BATCHES)),
                prepare_model_inputs_fn=lambda batch, _: _counted_tokens(batch),
                prepare_layer_inputs_fn=lambda inputs, counted, _: inputs[0][counted.to(inputs[0].device)],
                gather_distributed_inputs=False,
            )
        # Modules with the same input share one tensor in what PEFT returns.
        return {name: found[name].to("cpu", torch.float32, copy=True) for name in modules}


@contextmanager
def _hooks_restored(model: nn.Module) -> Iterator[None]:
    """Remove, after the context, hooks that came within it: those of PEFT stay on the model after an error."""
    before = [(module, dict(module._forward_hooks)) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks in before:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def _config(ranks: Mapping[str, int], rank: int) -> LoraConfig:
    """Build PEFT's configuration; with ``rho=1`` and equal ranks for equal inputs it re-distributes none of them."""
    smaller = {name: own for name, own in ranks.items() if own != rank}
    return LoraConfig(
        r=rank,
        target_modules=list(ranks),
        rank_pattern=smaller,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0),
    )


def _counted_tokens(batch: Batch) -> Tensor:
    """Return the mask of the tokens that are trained on, (samples, tokens)."""
    return batch.attention_mask.bool() & (batch.labels != IGNORE_INDEX)


def _batches_with(tokens: int, batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches with enough tokens for one decomposition; PEFT passes over the others, too.

    Raises:
        CalibrationError: there is none.
    """
    counts = [int(_counted_tokens(batch).sum()) for batch in batches]
    used = [batch for batch, count in zip(batches, counts, strict=True) if count >= tokens]
    if not used:
        raise CalibrationError(
            f"adaptive_init: eva needs {tokens} tokens that are trained on in one batch, as many as the largest rank, "
            f"and the largest batch has {max(counts, default=0)}; raise adaptive_calibration_batch_size, lower "
            "adaptive_max_rank, or set adaptive_init: default"
        )
    return used


def _check_inputs(modules: Mapping[str, nn.Module], batch: Batch, run: Callable[[], Any]) -> None:
    """Check on one batch what PEFT's code takes for granted.

    Every module reads one finite vector per token, once or several times in a pass. Where the first inputs of two
    modules are equal so are the others, as the vectors of the first module are given to both.

    Raises:
        CalibrationError: a module does not; the message names it.
    """
    faults: dict[str, str] = {}
    read: dict[str, list[float]] = {name: [] for name in modules}  # sums of the inputs, by which they are known

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            read[name].append(float(inputs[0].float().sum()))
            if inputs[0].shape[:-1] != batch.input_ids.shape:
                faults[name] = "reads tokens of all samples mixed, or no tokens (a routed expert, an image tower?)"
            elif not bool(inputs[0].isfinite().all()):
                faults[name] = "reads NaN or infinity: check the base model and its dtype (bf16 instead of fp16)"

        return look

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        run()
    by_first: dict[float, str] = {}
    for name, sums in read.items():
        if not sums:
            faults[name] = "reads nothing of these rows"
        elif read[other := by_first.setdefault(sums[0], name)] != sums:
            faults.setdefault(name, f"reads the first input of {other}, but not the same ones later in the pass")
    if faults:
        name = next(iter(faults))
        raise CalibrationError(
            f"adaptive_init: eva cannot start {first_of(list(faults), ', ', 1)}: it {faults[name]}; take it out of "
            "lora_target, or set adaptive_init: default"
        )


def _limited(run: Forward, most: int) -> Forward:
    """Wrap a forward pass, so that it ends what PEFT repeats without end where vectors do not settle.

    Raises (when called more than ``most`` times):
        CalibrationError: the vectors have not settled.
    """
    left = iter(range(most))

    def limited(model: nn.Module, batch: Batch) -> Any:
        if next(left, None) is None:
            raise CalibrationError(
                f"adaptive_init: eva found no steady directions of the inputs in {most} batches: the rows vary in "
                "fewer directions than the largest rank; raise adaptive_calibration_samples, lower adaptive_max_rank, "
                "or set adaptive_init: default"
            )
        return run(model, batch)

    return limited
