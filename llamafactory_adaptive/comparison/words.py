"""Verdicts and choices in plain words, one line each."""

import math

from llamafactory_adaptive.comparison.differences import Difference, Estimate
from llamafactory_adaptive.comparison.more_seeds import LEVEL, MOST_RATE_SEEDS, MOST_SEEDS
from llamafactory_adaptive.comparison.verdicts import Judgement


def judgement_in_words(judgement: Judgement) -> str:
    """Describe a judgement: the verdict, the relative difference with its interval, and what follows.

    With "equivalent" stands the 90 % interval, which decided it, with all others the 95 % interval.
    """
    arm, rival = judgement.arm, judgement.rival
    if judgement.verdict == "diverged":
        return f"{arm}: diverged at every setting tried, so that it cannot be compared with {rival}; try lower rates"
    if judgement.difference is None:
        return f"{arm}: not decided, as {rival} itself diverged at every setting tried; try lower rates"
    relation = {"better": "better than", "worse": "worse than", "equivalent": "equivalent to"}
    start = f"{arm}: {relation.get(judgement.verdict, 'not decided against')} {rival}"
    return f"{start}: {_interval_in_words(judgement)}{_consequence(judgement)}"


def _interval_in_words(judgement: Judgement) -> str:
    assert judgement.difference is not None
    digits, relative = _digits(judgement.effect), judgement.difference.relative
    level, low, high = "95 % interval", relative.low, relative.high
    if judgement.verdict == "equivalent":
        level, low, high = "90 % interval", relative.low_90, relative.high_90
    if judgement.difference.seeds == 1:
        level += " over rows alone"
    value, low_words, high_words = (f"{100 * each:+z.{digits}f} %" for each in (relative.value, low, high))
    return f"{value} ({level} {low_words} to {high_words})"


def _digits(effect: float) -> int:
    """Return how many decimals of a percentage tell a tenth of the effect."""
    return max(0, 1 - math.floor(math.log10(100 * effect) + 1e-9))


def _consequence(judgement: Judgement) -> str:
    assert judgement.difference is not None
    mattering = f"the {100 * judgement.effect:g} % that were to matter"
    if judgement.verdict == "equivalent":
        lower = judgement.difference.relative.value < 0.0
        small = f"; a difference is there, but a smaller one ({'lower' if lower else 'higher'} loss)"
        return f", within {mattering}{small if judgement.different else ''}"
    if judgement.verdict in ("better", "worse"):
        sure = _least(judgement.difference.relative) >= judgement.effect
        return f", by at least {mattering}" if sure else f"; whether by {mattering} is open"
    return f"; {what_would_decide(judgement)}"


def what_would_decide(judgement: Judgement) -> str:
    """Describe why a compared arm is not decided, and what would decide it; empty for other verdicts."""
    if judgement.verdict != "not decided" or judgement.difference is None:
        return ""
    return _doubt(judgement, judgement.difference) + _remedy(judgement, judgement.difference)


def _least(estimate: Estimate) -> float:
    """Return the smallest size of a difference within its interval; 0 where its sign is open."""
    return max(0.0, estimate.low, -estimate.high)


def _doubt(judgement: Judgement, difference: Difference) -> str:
    """Tell why an interval that leaves 0 out does not decide."""
    alone = judgement.p_holm is not None and difference.p_value <= LEVEL
    return f"one of {judgement.tests} arms may differ so by chance; " if alone else ""


def _remedy(judgement: Judgement, difference: Difference) -> str:
    """Tell what would decide a comparison that is not decided."""
    if difference.seeds == 1:
        return "seeds were not varied, and another seed may tell otherwise: give at least 3"
    if judgement.far_seed is not None:
        arm, seed = judgement.far_seed
        return f"seed {seed} of {arm} ended far above the others, so that no number of seeds can be told"
    if judgement.seeds_to_decide is not None:
        return f"about {judgement.seeds_to_decide} seeds would decide it"
    if judgement.rate_seeds_to_decide is not None:
        rate_seeds, seeds = judgement.rate_seeds_to_decide
        return f"about {seeds} seeds would decide it, with rates that {rate_seeds} seeds chose (--rate-seeds)"
    if judgement.more_rows:
        return "more held-out rows are needed: seeds alone cannot decide it"
    chosen = f", with rates that {MOST_RATE_SEEDS} seeds chose" if difference.rate_seeds else ""
    return f"not even {MOST_SEEDS} seeds would decide it{chosen}: seeds differ by too much for an effect so small"
