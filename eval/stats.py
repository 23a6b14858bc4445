"""Statistics of paired evaluations. Rows are the sampling unit: every model answers the same ones."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


RESAMPLES = 10_000
_ROUNDING = 1e-12  # a smaller sum counts as 0, as sums of thirds do not cancel exactly
_CHUNK = 200  # resamples at a time, to bound memory
FEWEST = 20  # rows that must differ for an interval
LISTED = 20  # rows that differ, up to which every assignment of signs is listed


def mean(values: Sequence[float]) -> float:
    """Compute the arithmetic mean."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Compute the standard error of the mean: sample standard deviation over the root of n; NaN for one value."""
    if len(values) < 2:
        return math.nan
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1) / len(values))


def mean_over_tasks(tasks: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Compute the unweighted mean of the tasks' means, and its standard error for independent tasks."""
    errors = [standard_error(values) for values in tasks]
    return mean([mean(values) for values in tasks]), math.sqrt(math.fsum(e**2 for e in errors)) / len(tasks)


@dataclass(frozen=True)
class McNemar:
    """Result of McNemar's test: rows that only one of the models got right, and the exact two-sided p value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Sequence[float], second: Sequence[float]) -> McNemar:
    """Compute McNemar's exact test (binomial, two-sided) on paired right-or-wrong answers (McNemar 1947).

    Args:
        first: 1.0 where the first model is right, else 0.0; one per row.
        second: the same rows for the second model.
    """
    only_first = sum(a > b for a, b in zip(first, second, strict=True))
    only_second = sum(b > a for a, b in zip(first, second, strict=True))
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return McNemar(only_first, only_second, min(1.0, float(2 * tail / 2**n)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of one family so that the chance of any false finding in it stays at the level (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none falls below one before it.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Difference:
    """Difference of two means (second minus first).

    Attributes:
        value: the difference.
        low: lower end of the 95 % interval; None where fewer than ``FEWEST`` rows differ.
        high: its upper end.
        p_value: two-sided, of the sign-flip test.
        n_differ: rows on which the models differ.
    """

    value: float
    low: float | None
    high: float | None
    p_value: float
    n_differ: int


def paired_difference(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Compute the difference of two models in the mean over tasks, with a p value and an interval.

    The p value is by flipping signs, the interval by a bootstrap of rows within their task. The interval is withheld
    where fewer than ``FEWEST`` rows differ: so few do not represent the differences that other rows might show.

    Args:
        first: per task, one value per row.
        second: the same tasks and rows for the second model.
        seed: seed of the draws.
        resamples: number of resamples, and of sign flips where there are too many to list.
    """
    gaps = [
        np.asarray(second[task], dtype=float) - np.asarray(first[task], dtype=float) for task in first
    ]  # one array of paired differences per task
    differ = int(sum(np.count_nonzero(np.abs(gap) > _ROUNDING) for gap in gaps))
    low, high = bootstrap_interval(gaps, seed, resamples) if differ >= FEWEST else (None, None)
    value = float(np.mean([gap.mean() for gap in gaps]))
    return Difference(value, low, high, sign_flip_p(gaps, seed, resamples), differ)


def sign_flip_p(gaps: Sequence[npt.NDArray[np.float64]], seed: int = 0, flips: int = RESAMPLES) -> float:
    """Compute the two-sided p value of a mean over tasks by Fisher's sign-flip permutation test.

    ``gaps`` holds the paired differences of each task's rows. If the models are alike, each row's difference is as
    likely with either sign. Up to ``LISTED`` rows that differ, all assignments are listed; beyond, ``flips`` are drawn
    and the p value is (1 + hits) / (1 + flips), never 0 (Phipson and Smyth 2010). For one task with right-or-wrong
    rows, the listed test equals McNemar's exact test.
    """
    parts = np.concatenate([gap / (len(gap) * len(gaps)) for gap in gaps])
    parts = parts[np.abs(parts) > _ROUNDING / len(parts)]
    least = abs(parts.sum()) - _ROUNDING
    if len(parts) <= LISTED:
        sums = np.zeros(1)
        for part in parts:
            sums = np.concatenate([sums + part, sums - part])
        return float(np.mean(np.abs(sums) >= least))
    rng = np.random.default_rng(seed)
    hits = 0
    for done in range(0, flips, _CHUNK):
        signs = rng.integers(2, size=(min(_CHUNK, flips - done), len(parts)), dtype=np.int8) * 2 - 1
        hits += int(np.count_nonzero(np.abs(signs @ parts) >= least))
    return (1 + hits) / (1 + flips)


def bootstrap_interval(
    gaps: Sequence[npt.NDArray[np.float64]], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Compute the 95 % percentile interval of the mean over tasks by bootstrap (Efron and Tibshirani 1993).

    Rows are drawn with replacement within their task.
    """
    rng = np.random.default_rng(seed)
    drawn = sum(_resampled_means(gap, rng, resamples) for gap in gaps) / len(gaps)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _resampled_means(
    gaps: npt.NDArray[np.float64], rng: np.random.Generator, resamples: int
) -> npt.NDArray[np.float64]:
    n = len(gaps)
    parts = [
        gaps[rng.integers(n, size=(min(_CHUNK, resamples - done), n))].mean(axis=1)
        for done in range(0, resamples, _CHUNK)
    ]
    return np.concatenate(parts)


def pass_at_k(right: int, n: int, k: int) -> float:
    """Estimate the chance that at least one of ``k`` answers is right, where ``right`` of ``n`` are (Chen 2021).

    The estimate is unbiased: 1 - C(n - right, k) / C(n, k).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str], no_answer: Collection[str]) -> int:
    """Return the index of the answer that most agree on; among equals, of the one given first.

    Answers in ``no_answer`` have no vote; where there are no others, the index is 0.
    """
    votes = Counter(answer for answer in answers if answer not in no_answer)
    return answers.index(max(votes, key=votes.__getitem__)) if votes else 0
