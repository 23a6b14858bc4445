"""Running statistics of importances in flat blocks: smoothed (igu, adalora), or means (igu; tsq, of an interval)."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.methods._adapter_form import ReturnRule, Shrinkage
from llamafactory_adaptive.options import option


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LARGEST_BETA = 0.95  # a step of 5 % of the difference; bfloat16 rounds off what is less than 0.4 % of S


def statistics_dtype(idle: str = "") -> Any:
    """Declare the option that chooses the type in which S and U are kept; ``idle`` says where it has no effect."""
    return option(
        "float32",
        "Type in which the running mean and deviation of the importance are kept between steps: bfloat16 halves their "
        f"memory, to half of AdamW's, and rounds them; ranks may differ by a few components.{idle}",
        choices=tuple(_DTYPES),
    )


def check_statistics_dtype(method: str, dtype: str, **betas: float | None) -> list[Problem]:
    """Find decay rates whose steps bfloat16 would round off, so that the statistics would no longer move."""
    reason = f"bfloat16 rounds off the small steps of a rate above {_LARGEST_BETA}"
    return [
        Problem(f"{method}_{name}", beta, reason, f"{method}_{name}: 0.85, or {method}_statistics_dtype: float32")
        for name, beta in betas.items()
        if dtype == "bfloat16" and beta is not None and beta > _LARGEST_BETA
    ]


class _Blockwise:
    """Statistics of elements as one tensor per block, in the attributes that ``kinds`` names; saved and restored."""

    kinds: tuple[str, ...]

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name, as a resume needs them."""
        return {f"{kind}.{block}": value for kind in self.kinds for block, value in getattr(self, kind).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tensors by what :meth:`state` returned."""
        for kind in self.kinds:
            getattr(self, kind).clear()
        for name, value in state.items():
            kind, _, block = name.partition(".")
            getattr(self, kind)[block] = value


class SmoothedImportance(_Blockwise):
    """Running mean and running deviation of element importances (AdaLoRA, Eq. 9-10; IGU-LoRA, Eq. 10-12).

    ``S <- b1 S + (1 - b1) s`` and ``U <- b2 U + (1 - b2) |s - S|`` with the new S; both start at zero. Elements come
    in named blocks, flat, in fp32, which is computed in whatever type the two are kept in. Memory: two numbers per
    element.
    """

    kinds = ("mean", "deviation")

    def __init__(self, beta1: float, beta2: float, dtype: str = "float32") -> None:
        self.beta1, self.beta2, self.dtype = beta1, beta2, _DTYPES[dtype]
        self.mean: dict[str, Tensor] = {}
        self.deviation: dict[str, Tensor] = {}

    def update(self, block: str, importance: Tensor, observed: Tensor | None = None) -> None:
        """Update S and U with one observation; ``importance`` is overwritten.

        Args:
            block: name of the block.
            importance: s, non-negative, any shape that stays the same.
            observed: 1.0 for elements to update, 0.0 for those that keep S and U, of that shape; None updates all.
        """
        if block not in self.mean:
            self.mean[block] = torch.zeros_like(importance, dtype=self.dtype)
            self.deviation[block] = torch.zeros_like(importance, dtype=self.dtype)
        mean, deviation = self._values(block)
        step = importance.sub_(mean)
        if observed is not None:
            step.mul_(observed)
        mean.add_(step, alpha=1 - self.beta1)
        # With the new S, |s - S_new| = b1 |s - S_old|: no second look at s is needed.
        step.abs_().mul_(self.beta1).sub_(deviation)
        if observed is not None:
            step.mul_(observed)
        deviation.add_(step, alpha=1 - self.beta2)
        if self.dtype != mean.dtype:
            self.mean[block].copy_(mean)
            self.deviation[block].copy_(deviation)

    def _values(self, block: str) -> tuple[Tensor, Tensor]:
        """Return S and U in fp32: themselves where they are kept in it, copies otherwise."""
        return self.mean[block].float(), self.deviation[block].float()

    def snr(self, block: str, epsilon: float) -> Tensor:
        """Compute ``(S + e) / (U + e)``: a large, steady importance scores high (IGU-LoRA, Eq. 12)."""
        mean, deviation = self._values(block)
        return (mean + epsilon) / (deviation + epsilon)

    def product(self, block: str) -> Tensor:
        """Compute ``S * U`` (AdaLoRA, Eq. 11)."""
        mean, deviation = self._values(block)
        return mean * deviation

    def discounted(self, block: str) -> Tensor:
        """Compute ``S * S / (S + U)``: the importance, less where it is unsteady; 0 where S is."""
        mean, deviation = self._values(block)
        return mean.square().div_((mean + deviation).clamp_(min=torch.finfo(mean.dtype).tiny))

    def forget(self, block: str, where: Tensor) -> None:
        """Set S and U back to zero where ``where`` is 1.0, and leave them where it is 0.0."""
        for values in (self.mean, self.deviation):
            values[block].mul_(1.0 - where)

    def log_sum(self, block: str) -> Tensor:
        """Sum and count the logarithms of the positive S of a block, (2,)."""
        mean, _ = self._values(block)
        positive = mean[mean > 0]
        return torch.stack([positive.log().sum(), positive.new_tensor(float(positive.numel()))])


class RunningMean(_Blockwise):
    """Running mean S of element importances: of all observations, or mostly of the last ``1 / (1 - beta)``.

    ``S <- S + max(1/n, 1 - beta) (s - S)`` at the n-th observation of a block, so that S is a mean from the first on.
    Observations come in named blocks, of elements or of means over components, in fp32. Memory: one number for each.
    """

    kinds = ("mean", "count")

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.mean: dict[str, Tensor] = {}
        self.count: dict[str, Tensor] = {}

    def update(self, block: str, importance: Tensor, observed: Tensor | None = None) -> None:
        """Update S with one observation; arguments as in :meth:`SmoothedImportance.update`."""
        if block not in self.mean:
            self.mean[block], self.count[block] = torch.zeros_like(importance), torch.zeros(())
        self.count[block] += 1
        step = importance.sub_(self.mean[block])
        if observed is not None:
            step.mul_(observed)
        self.mean[block].add_(step, alpha=max(1.0 / self.count[block].item(), 1.0 - self.beta))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace means and counts by what :meth:`state` returned; counts are read at every step, on the CPU."""
        super().load(state)
        self.count = {block: count.cpu() for block, count in self.count.items()}


class IntervalMean(_Blockwise):
    """Mean of the observations of one interval, in named blocks, fp32."""

    kinds = ("total", "count")

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, Tensor] = {}

    def update(self, block: str, values: Tensor) -> None:
        """Add one observation; ``values`` must not be used afterwards."""
        if block not in self.total:
            self.total[block], self.count[block] = values, torch.ones(())
        else:
            self.total[block].add_(values)
            self.count[block] += 1

    def mean(self, block: str) -> Tensor:
        """Compute the mean of this interval's observations, in their shape."""
        return self.total[block] / self.count[block].item()

    def clear(self) -> None:
        """Clear sums and counts, which begins another interval."""
        self.total.clear()
        self.count.clear()


class ImportanceStatistics(Protocol):
    """Running statistics of importances that a :class:`SmoothedMethod` updates."""

    def update(self, block: str, importance: Tensor, observed: Tensor | None = None) -> None:
        """Update the statistics of a block with one observation."""

    def state(self) -> dict[str, Tensor]:
        """Return all tensors by name."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace all tensors by what :meth:`state` returned."""


class SmoothedMethod:
    """The observing half of a dynamic method: smooths ``s = |w g|``, and saves and restores the statistics."""

    def __init__(self, importance: ImportanceStatistics) -> None:
        self.importance = importance

    @property
    def return_rule(self) -> ReturnRule:
        """Return the rule of AdaLoRA: components come back as they were, once they are among the best."""
        return ReturnRule()

    @property
    def shrinkage(self) -> Shrinkage | None:
        """Return None: training is at the full position."""
        return None

    def importance_of(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """Compute ``s = |w g|``."""
        return gradients.mul_(weights).abs_()

    def observe(self, block: str, weights: Tensor, gradients: Tensor, live: Tensor | None) -> None:
        """Update the statistics of elements with their importances."""
        self.importance.update(block, self.importance_of(weights, gradients), live)

    def observe_components(self, block: str, importance_Mr: Tensor, live_Mr: Tensor | None) -> None:
        """Update the statistics of components with their mean importances."""
        self.importance.update(block, importance_Mr, live_Mr)

    def state(self) -> dict[str, Tensor]:
        """Return the running statistics."""
        return self.importance.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.importance.load(state)
