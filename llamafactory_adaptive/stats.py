"""Streaming moments of activations, and the metrics and combinations built on them. torch only.

Shape suffixes: ``_N`` input features of one module, ``_T`` tokens, ``_M`` modules.
"""

import torch
from torch import Tensor


# Rows are reduced in pieces of about this many elements: small enough to stay in a CPU's cache (a whole activation in
# fp32 costs 10 x more there, in page faults), large enough to keep a GPU busy, and never a second copy of the input.
_CHUNK_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 24}


def second_moment_sum(x_TN: Tensor, rows: Tensor | None = None, weights_T: Tensor | None = None) -> Tensor:
    """``sum_t w_t * x_tj^2`` in fp32 pieces, accumulated in fp64.

    Args:
        x_TN: activations, any float dtype.
        rows: indices of the rows that count (padding left out); all rows when None.
        weights_T: non-negative weight per row of ``x_TN``; 1 when None.

    Returns:
        fp64 vector of length N on the device of ``x_TN``.
    """
    features = x_TN.shape[-1]
    chunk = max(1, _CHUNK_ELEMENTS.get(x_TN.device.type, _CHUNK_ELEMENTS["other"]) // features)
    total_N = torch.zeros(features, dtype=torch.float64, device=x_TN.device)
    count = len(x_TN) if rows is None else len(rows)
    for start in range(0, count, chunk):
        squared = _rows(x_TN, rows, start, chunk).to(torch.float32, copy=True).square_()
        if weights_T is None:
            total_N += squared.sum(0)
        else:
            total_N += _rows(weights_T, rows, start, chunk).to(torch.float32) @ squared
    return total_N


def _rows(x_T: Tensor, rows: Tensor | None, start: int, count: int) -> Tensor:
    """``count`` rows from ``start``: of the tensor itself, or of those that ``rows`` picks."""
    if rows is None:
        return x_T[start : start + count]
    return x_T.index_select(0, rows[start : start + count])


def top_k_mean(lambda_N: Tensor, fraction: float) -> Tensor:
    """Mean of the ``fraction`` largest entries, at least one (Sensitivity-LoRA, Eq. 9)."""
    k = max(1, int(fraction * len(lambda_N)))
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
