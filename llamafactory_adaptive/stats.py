"""Streaming moments of activations and of importances, and the metrics built on them. torch only.

Shape suffixes: ``_N`` input features of one module, ``_T`` tokens, ``_M`` modules.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def top_k_mean(lambda_N: Tensor, fraction: float) -> Tensor:
    """Mean of the ``fraction`` largest entries, at least one (Sensitivity-LoRA, Eq. 9)."""
    k = max(1, round(fraction * len(lambda_N)))
    return lambda_N.topk(k).values.mean()


def effective_rank(lambda_N: Tensor, energy: float) -> Tensor:
    """Fewest of the largest entries that hold ``energy`` of the total (Sensitivity-LoRA, Eq. 10)."""
    cumulative_N = lambda_N.sort(descending=True).values.cumsum(0)
    return (cumulative_N < energy * cumulative_N[-1]).sum() + 1


def combine(first_M: Tensor, second_M: Tensor, equal: bool = False) -> Tensor:
    """Weighted sum of two metrics over modules (Sensitivity-LoRA, Eq. 11-14).

    Each metric gets the weight ``sigma / mu^2`` of its own spread (population standard deviation) over the modules,
    which cancels any constant factor. A metric that is the same everywhere thus says nothing.

    Args:
        first_M, second_M: one non-negative value per module.
        equal: weigh by ``1 / mu`` instead: both metrics at mean 1, equally heard (the paper's ablation; what brings
            them to one scale there is not stated, this is our choice).
    """
    return weigh(first_M, equal) + weigh(second_M, equal)


def weigh(metric_M: Tensor, equal: bool = False) -> Tensor:
    """``metric * sigma / mu^2``, or ``metric / mu`` when ``equal``; zeros for a metric whose mean is zero."""
    mean = metric_M.mean()
    if mean <= 0:
        return torch.zeros_like(metric_M)
    return metric_M / mean if equal else metric_M * metric_M.std(correction=0) / mean**2


def log_compress(metric_M: Tensor) -> Tensor:
    """``log(1 + metric / median)``: tames a few huge values, keeps the order, ignores constant factors."""
    middle = metric_M.median()
    return torch.log1p(metric_M / middle) if middle > 0 else metric_M


def normalise_within(metric_M: Tensor, groups: list[str]) -> Tensor:
    """Divide each value by the mean of its group, so that no group outweighs another by its scale."""
    result_M = metric_M.clone()
    for group in dict.fromkeys(groups):
        members = torch.tensor([name == group for name in groups])
        mean = metric_M[members].mean()
        if mean > 0:
            result_M[members] = metric_M[members] / mean
    return result_M


class _Blockwise:
    """Tensors by named block, under the attributes that ``kinds`` names: how they are kept and read back."""

    kinds: tuple[str, ...]

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on, by name."""
        return {f"{kind}.{block}": value for kind in self.kinds for block, value in getattr(self, kind).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave; what is there now is forgotten."""
        for kind in self.kinds:
            getattr(self, kind).clear()
        for name, value in state.items():
            kind, _, block = name.partition(".")
            getattr(self, kind)[block] = value


class SmoothedImportance(_Blockwise):
    """Running mean and running deviation of element importances (AdaLoRA, Eq. 9-10; IGU-LoRA, Eq. 10-12).

    ``S <- b1 S + (1 - b1) s`` and ``U <- b2 U + (1 - b2) |s - S|`` with the new S; both start at zero. Elements come
    in named blocks, flat, in fp32. Memory: two numbers per element.
    """

    kinds = ("mean", "deviation")

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.mean: dict[str, Tensor] = {}
        self.deviation: dict[str, Tensor] = {}

    def update(self, block: str, importance: Tensor, observed: Tensor | None = None) -> None:
        """Take one observation; ``importance`` is used up as scratch.

        Args:
            block: name of the block.
            importance: s, non-negative, any shape that stays the same.
            observed: elements to update, of that shape; the others keep S and U. All when None.
        """
        if block not in self.mean:
            self.mean[block] = torch.zeros_like(importance)
            self.deviation[block] = torch.zeros_like(importance)
        mean, deviation = self.mean[block], self.deviation[block]
        step = importance.sub_(mean)
        if observed is not None:
            step.mul_(observed)
        mean.add_(step, alpha=1 - self.beta1)
        # With the new S, |s - S_new| = b1 |s - S_old|: no second look at s is needed.
        step.abs_().mul_(self.beta1).sub_(deviation)
        if observed is not None:
            step.mul_(observed)
        deviation.add_(step, alpha=1 - self.beta2)

    def snr(self, block: str, epsilon: float) -> Tensor:
        """``(S + e) / (U + e)``: a large, steady importance scores high (IGU-LoRA, Eq. 12)."""
        return (self.mean[block] + epsilon) / (self.deviation[block] + epsilon)

    def product(self, block: str) -> Tensor:
        """``S * U`` (AdaLoRA, Eq. 11)."""
        return self.mean[block] * self.deviation[block]


class IntervalMean(_Blockwise):
    """Mean of the observations of one interval. Elements come in named blocks, flat, in fp32: a number per element."""

    kinds = ("total", "count")

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}
        self.count: dict[str, Tensor] = {}

    def update(self, block: str, values: Tensor) -> None:
        """Take one observation; ``values`` is kept, or used up as scratch."""
        if block not in self.total:
            self.total[block], self.count[block] = values, torch.ones(())
        else:
            self.total[block].add_(values)
            self.count[block] += 1

    def mean(self, block: str) -> Tensor:
        """Per element."""
        return self.total[block] / self.count[block].item()

    def clear(self) -> None:
        """Another interval begins."""
        self.total.clear()
        self.count.clear()
