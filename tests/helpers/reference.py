"""The formulas of Sensitivity-LoRA once more, in NumPy and as literally as they can be written: the tests' oracle."""

import numpy as np


def metrics(lam: np.ndarray, fraction: float = 0.5, energy: float = 0.85) -> tuple[float, float, int]:
    lam = np.sort(lam)[::-1]
    k = max(1, round(fraction * len(lam)))
    rank = next(i + 1 for i in range(len(lam)) if lam[: i + 1].sum() >= energy * lam.sum())
    return float(lam.sum()), float(lam[:k].mean()), rank


def theta(lams: list[np.ndarray], **options: float) -> np.ndarray:
    trace, top, rank = (
        np.array(column, dtype=float) for column in zip(*(metrics(x, **options) for x in lams), strict=True)
    )
    local = top.std() / top.mean() ** 2 * top + rank.std() / rank.mean() ** 2 * rank
    return trace.std() / trace.mean() ** 2 * trace + local.std() / local.mean() ** 2 * local


def water_filled(share: np.ndarray, cost: np.ndarray, budget: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Bisection on the water level: slow, obvious."""
    under, over = 0.0, 1e18
    for _ in range(400):
        level = (under + over) / 2
        spent = (np.clip(level * share, low, high) * cost).sum()
        under, over = (level, over) if spent < budget else (under, level)
    return np.clip(under * share, low, high)


def running_mean(importances: list[np.ndarray], beta: float) -> np.ndarray:
    """Compute the mean in which the n-th value counts max(1/n, 1 - beta), and those before it share the rest."""
    counts = [max(1 / n, 1 - beta) for n in range(1, len(importances) + 1)]
    weights = [count * np.prod([1 - later for later in counts[n + 1 :]]) for n, count in enumerate(counts)]
    return np.average(np.asarray(importances, dtype=np.float64), axis=0, weights=weights)


def smoothed(importances: list[np.ndarray], beta1: float = 0.85, beta2: float = 0.85) -> tuple[np.ndarray, np.ndarray]:
    """IGU-LoRA, Eq. 10-11."""
    mean, deviation = np.zeros_like(importances[0]), np.zeros_like(importances[0])
    for s in importances:
        mean = beta1 * mean + (1 - beta1) * s
        deviation = beta2 * deviation + (1 - beta2) * abs(s - mean)
    return mean, deviation


def component_scores(lam: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """IGU-LoRA, Eq. 3, of element scores: lam (r,), P (d_out, r), Q (r, d_in)."""
    return np.array([lam[i] + p[:, i].mean() + q[i].mean() for i in range(len(lam))])


def trapezoid_path(intervals: int) -> list[tuple[float, float]]:
    """All nodes of the trapezoid rule over [0, 1] but a = 0, where the gradient of a product of three is zero."""
    return [(k / intervals, (1.0 if k < intervals else 0.5) / intervals) for k in range(1, intervals + 1)]
