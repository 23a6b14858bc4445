"""How many seeds would decide a comparison that is not decided yet, from the variances that were seen."""

import math
from dataclasses import replace
from functools import cache
from statistics import NormalDist

from llamafactory_adaptive.comparison.differences import Difference


LEVEL = 0.05
CHANCE = 0.8  # that so many seeds decide
MOST_SEEDS = 100
_COUNTS = (*range(2, 21), 25, 30, 40, 50, 75, MOST_SEEDS)  # of many seeds the number is rough anyway
MOST_RATE_SEEDS = 20
_RATE_SEEDS = (2, 3, 5, 10, MOST_RATE_SEEDS)


def seeds_to_decide(difference: Difference, effect: float, tests: int) -> int | None:
    """Estimate with how many seeds, on these rows, four comparisons in five would be decided either way.

    It is taken that the difference on these rows is the one seen. With S seeds its estimate has the variance
    ``between_seeds / S``; an interval reaches as far as its parts squared and added,
    ``sqrt(t^2 (between_seeds / S + choices_over_seeds^2) + z^2 (between_rows / R + choices_over_rows^2))``, about as
    far as the interval of ``Difference`` (Banerjee 1960, Sankhya 22). Decided is what lies outside such an interval
    around 0, at the level that Holm's correction may demand of it, or inside +- effect by such an interval of 90 %.

    Args:
        difference: what was seen, with two seeds or more.
        effect: smallest relative difference that matters.
        tests: number of arms that are judged together.

    Returns:
        Number of seeds in all; None where ``MOST_SEEDS`` are too few.
    """
    return _fewest_seeds(difference, effect, tests, difference.seeds + 1)


def rate_seeds_to_decide(difference: Difference, effect: float, tests: int) -> tuple[int, int] | None:
    """Estimate with how many seeds that choose, and how many that judge, it would be decided.

    What these add to the error of a choice is taken to fall with the square root of their number.

    Returns:
        Both numbers, with the fewest seeds that choose; None where more of those would not do, or none chose.
    """
    if not difference.rate_seeds:
        return None
    for rate_seeds in (count for count in _RATE_SEEDS if count > difference.rate_seeds):
        over_seeds = difference.choices_over_seeds * math.sqrt(difference.rate_seeds / rate_seeds)
        surer = replace(difference, choices_over_seeds=over_seeds)
        if (seeds := _fewest_seeds(surer, effect, tests, difference.seeds)) is not None:
            return rate_seeds, seeds
    return None


def _fewest_seeds(difference: Difference, effect: float, tests: int, least: int) -> int | None:
    counts = (seeds for seeds in _COUNTS if seeds >= least)
    return next((seeds for seeds in counts if chance_to_decide(difference, effect, tests, seeds) >= CHANCE), None)


def rows_too_few(difference: Difference, effect: float, tests: int) -> bool:
    """Tell whether no number of seeds would decide, as the rows alone leave both 0 and the effect open."""
    over_rows = _over_rows(difference)
    size, normal = abs(difference.relative.value), NormalDist()
    apart, within = normal.inv_cdf(1.0 - LEVEL / tests / 2.0), normal.inv_cdf(1.0 - LEVEL)
    return effect - within * over_rows <= size <= apart * over_rows


def chance_to_decide(difference: Difference, effect: float, tests: int, seeds: int) -> float:
    """Compute the chance that ``seeds`` new seeds decide, as described for ``seeds_to_decide``."""
    over_seeds = max(math.sqrt(difference.between_seeds / seeds), 1e-12)  # a distribution of no width has no chances
    by_seeds, by_rows = math.hypot(over_seeds, difference.choices_over_seeds), _over_rows(difference)
    apart, within = (
        math.hypot(student_quantile(1.0 - tail, seeds - 1) * by_seeds, NormalDist().inv_cdf(1.0 - tail) * by_rows)
        for tail in (LEVEL / tests / 2.0, LEVEL)
    )
    estimate, inner = NormalDist(difference.relative.value, over_seeds), effect - within
    if inner >= apart:
        return 1.0
    outside = 1.0 - estimate.cdf(apart) + estimate.cdf(-apart)
    return outside + (estimate.cdf(inner) - estimate.cdf(-inner) if inner > 0.0 else 0.0)


def _over_rows(difference: Difference) -> float:
    """Return the standard error over rows, of those that judge and of those that choose."""
    return math.hypot(math.sqrt(difference.between_rows / difference.rows), difference.choices_over_rows)


@cache
def student_quantile(probability: float, freedom: int) -> float:
    """Compute the quantile of Student's t for a probability of at least one half, by bisection."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        low, high = high, 2.0 * high
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return high


def student_cdf(t: float, freedom: int) -> float:
    """Compute the distribution function of Student's t for whole degrees of freedom and t of at least 0.

    By its finite series (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4): the standard library and NumPy have none.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    inside = 2.0 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + inside / 2.0
