"""Statistics of paired evaluations. Rows are the sampling unit: every model answers the same ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


RESAMPLES = 10_000
_ROUNDING = 1e-12  # sums of thirds that ought to be 0
_CHUNK = 1000  # resamples at a time, to bound memory


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean, sample standard deviation over the root of n; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))


def mean_over_tasks(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Unweighted mean of the tasks' means, and its standard error for independent tasks."""
    errors = [standard_error(values) for values in tasks]
    return mean([mean(values) for values in tasks]), math.sqrt(math.fsum(e**2 for e in errors)) / len(tasks)


@dataclass(frozen=True)
class McNemar:
    """Rows that only the first model got right, only the second, and the exact two-sided p value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """McNemar's exact test (binomial, two-sided) on paired right-or-wrong answers (McNemar 1947).

    Args:
        first: 1.0 where the first model is right, else 0.0; one per row.
        second: the same rows for the second model.
    """
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return McNemar(only_first, only_second, min(1.0, float(2 * tail / 2**n)))


@dataclass(frozen=True)
class Difference:
    """Difference of two means (second minus first), its 95 % interval and a two-sided p value, all by bootstrap."""

    value: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Bootstrap of the difference in the mean over tasks; rows are drawn in pairs, within their task.

    Args:
        first: per task, one value per row.
        second: the same tasks and rows for the second model.
        seed: of the draw.
        resamples: number of resamples.

    Returns:
        The percentile interval; the p value is twice the smaller share of resamples on one side of 0 (Efron and
        Tibshirani 1993, chapter 13), at least 1 / resamples.
    """
    rng = np.random.default_rng(seed)
    gaps = [
        np.asarray(second[task], dtype=float) - np.asarray(first[task], dtype=float) for task in first
    ]  # one array of paired differences per task
    drawn = sum(_resampled_means(gap, rng, resamples) for gap in gaps) / len(gaps)
    low, high = np.percentile(drawn, [2.5, 97.5])
    side = min(float(np.mean(drawn <= _ROUNDING)), float(np.mean(drawn >= -_ROUNDING)))
    return Difference(
        float(np.mean([gap.mean() for gap in gaps])), float(low), float(high), min(1.0, max(2 * side, 1 / resamples))
    )


def _resampled_means(
    gaps: npt.NDArray[np.float64], rng: np.random.Generator, resamples: int
) -> npt.NDArray[np.float64]:
    n = len(gaps)
    parts = [
        gaps[rng.integers(n, size=(min(_CHUNK, resamples - done), n))].mean(axis=1)
        for done in range(0, resamples, _CHUNK)
    ]
    return np.concatenate(parts)
