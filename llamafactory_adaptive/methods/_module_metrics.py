"""Metrics of one module's statistics, and their combination over modules."""

import torch
from torch import Tensor


def top_k_mean(lambda_N: Tensor, fraction: float) -> Tensor:
    """Average the largest entries, a ``fraction`` of all and at least one (Sensitivity-LoRA, Eq. 9)."""
    k = max(1, round(fraction * len(lambda_N)))
    return lambda_N.topk(k).values.mean()


def effective_rank(lambda_N: Tensor, energy: float) -> Tensor:
    """Count how many of the largest entries hold the share ``energy`` of the total (Sensitivity-LoRA, Eq. 10)."""
    cumulative_N = lambda_N.sort(descending=True).values.cumsum(0)
    return (cumulative_N < energy * cumulative_N[-1]).sum() + 1


def combine(first_M: Tensor, second_M: Tensor, equal: bool = False) -> Tensor:
    """Compute the weighted sum of two metrics over modules (Sensitivity-LoRA, Eq. 11-14).

    Each metric gets the weight ``sigma / mu^2`` of its own spread (population standard deviation) over the modules,
    which cancels any constant factor. A metric that is equal for all modules thus has no
    weight.

    Args:
        first_M, second_M: one non-negative value per module.
        equal: weigh by ``1 / mu`` instead, so that both metrics have mean 1 and count the same (the paper's ablation;
            how it brings them to one scale is not stated, this is our choice).
    """
    return weigh(first_M, equal) + weigh(second_M, equal)


def weigh(metric_M: Tensor, equal: bool = False) -> Tensor:
    """Compute ``metric * sigma / mu^2``, or ``metric / mu`` if ``equal``; zeros for a metric whose mean is zero."""
    mean = metric_M.mean()
    if mean <= 0:
        return torch.zeros_like(metric_M)
    return metric_M / mean if equal else metric_M * metric_M.std(correction=0) / mean**2


def log_compress(metric_M: Tensor) -> Tensor:
    """Compute ``log(1 + metric / median)``, which shrinks huge values, keeps the order, ignores constant factors."""
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
