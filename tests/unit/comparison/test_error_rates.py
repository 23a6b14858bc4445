"""Error rates and power in simulations whose truth is known, with the variances that runs of LoRA show.

Standard deviations are shares of the loss: of a seed's whole difference, of a row's in all seeds, of a row's in one
seed. Rows have a log-normal number of tokens. Every simulated arm is one experiment; all share a rival that has no
noise of its own, as only differences count.
"""

import math

import numpy as np
import pytest

from llamafactory_adaptive.comparison.differences import paired_differences
from llamafactory_adaptive.comparison.losses import Losses
from llamafactory_adaptive.comparison.verdicts import holm


EXPERIMENTS, DRAWS = 1000, 600
EFFECT = 0.005
MIXES = {  # sd of seed, row, both
    "seeds": (0.003, 0.01, 0.02),
    "rows": (0.0005, 0.06, 0.02),
    "half and half": (0.002, 0.035, 0.02),
    "both": (0.0, 0.0, 0.08),
}
SKEW = 4.0  # shape of the gamma distribution of rows' effects: their skewness is 1


def experiments(mix, seeds, rows, truth, count=EXPERIMENTS, shape=SKEW):
    """Simulate arms whose loss is 1 + truth of the rival's, with effects of both; return the rival and the arms."""
    rng = np.random.default_rng([seeds, rows])
    tokens_R = np.ceil(rng.lognormal(4.0, 0.6, rows))
    rival_R = rng.gamma(4.0, 0.25, rows)
    seed_sd, row_sd, both_sd = MIXES[mix]
    row_effects = row_sd * (rng.gamma(shape, size=(count, 1, rows)) - shape) / math.sqrt(shape)
    noise = seed_sd * rng.standard_normal((count, seeds, 1)) + row_effects
    noise = noise + both_sd * rng.standard_normal((count, seeds, rows))
    names = tuple(range(seeds))
    rival = Losses(names, np.repeat(rival_R[None], seeds, axis=0), tokens_R)
    return rival, [Losses(names, rival_R * (1.0 + truth) + each, tokens_R) for each in noise]


def judged(*arguments, **options):
    rival, arms = experiments(*arguments, **options)
    return paired_differences(rival, arms, row_draws=DRAWS)


def most(rate, count=EXPERIMENTS):
    """The rate with two and a half standard errors of ``count`` experiments."""
    return rate + 2.5 * math.sqrt(rate * (1.0 - rate) / count)


def share(flags):
    return float(np.mean(list(flags)))


def equivalent(found):
    return found.relative.low_90 > -EFFECT and found.relative.high_90 < EFFECT


SHOWN = [("seeds", 3, 64), ("half and half", 3, 64), ("seeds", 5, 500)]
ALL = [(mix, *size) for mix in MIXES for size in ((3, 64), (5, 64), (3, 500), (5, 500))]
CASES = [*SHOWN, *(pytest.param(*case, marks=pytest.mark.repeats) for case in ALL if case not in SHOWN)]


@pytest.mark.parametrize(("mix", "seeds", "rows"), CASES)
def test_an_arm_without_effect_is_better_or_worse_in_one_case_of_twenty(mix, seeds, rows):
    found = judged(mix, seeds, rows, 0.0)
    p_values = [each.p_value for each in found]
    wrong = share(p <= 0.05 for p in p_values)
    assert wrong <= most(0.05)
    outside = share(each.relative.low > 0.0 or each.relative.high < 0.0 for each in found)
    assert outside == pytest.approx(wrong, abs=0.005), "interval and p value agree"
    families = [holm(p_values[start : start + 10]) for start in range(0, EXPERIMENTS, 10)]
    assert share(min(family) <= 0.05 for family in families) <= most(0.05, len(families)), "any of ten arms"


@pytest.mark.parametrize("size", [(3, 64), pytest.param((5, 500), marks=pytest.mark.repeats)])
def test_rows_with_long_tails_are_as_safe(size):
    """Effects of rows as skewed as an exponential distribution (skewness 2), which are most of the variance."""
    found = judged("rows", *size, 0.0, shape=1.0)
    assert share(each.p_value <= 0.05 for each in found) <= most(0.05)


@pytest.mark.parametrize(
    ("mix", "seeds", "rows", "truth"),
    [
        ("seeds", 5, 500, EFFECT),
        pytest.param("half and half", 3, 500, -EFFECT, marks=pytest.mark.repeats),
        pytest.param("both", 3, 500, EFFECT, marks=pytest.mark.repeats),
        pytest.param("rows", 5, 500, -EFFECT, marks=pytest.mark.repeats),
        pytest.param("seeds", 3, 64, EFFECT, marks=pytest.mark.repeats),
    ],
)
def test_an_arm_at_the_border_of_the_effect_is_equivalent_in_one_case_of_twenty(mix, seeds, rows, truth):
    assert share(map(equivalent, judged(mix, seeds, rows, truth))) <= most(0.05)


@pytest.mark.parametrize(
    ("mix", "seeds", "least"),
    [
        ("seeds", 3, 0.9),  # measured: 0.95
        pytest.param("half and half", 3, 0.95, marks=pytest.mark.repeats),  # 1.00
        pytest.param("seeds", 5, 0.97, marks=pytest.mark.repeats),  # 1.00
        pytest.param("rows", 3, 0.9, marks=pytest.mark.repeats),  # 0.98
    ],
)
def test_a_large_effect_is_found(mix, seeds, least):
    """Three times the least effect that matters, on 500 rows."""
    found = judged(mix, seeds, 500, -3.0 * EFFECT, count=300)
    assert share(each.p_value <= 0.05 and each.relative.value < 0.0 for each in found) >= least


@pytest.mark.parametrize(
    ("mix", "least"), [("seeds", 0.6), pytest.param("half and half", 0.3, marks=pytest.mark.repeats)]
)
def test_arms_without_effect_are_found_equivalent(mix, least):
    """Five seeds and 500 rows, which are few for half a per cent; measured: 0.71 and 0.36."""
    assert share(map(equivalent, judged(mix, 5, 500, 0.0, count=300))) >= least


def test_the_simulation_catches_the_percentile_interval_over_three_seeds():
    """What the module does without, resampled both ways: far more false findings than one in twenty."""
    rival, arms = experiments("seeds", 3, 500, 0.0, 300)
    rng = np.random.default_rng(0)
    rows_drawn = np.stack([np.bincount(rng.integers(500, size=500), minlength=500) for _ in range(DRAWS)])
    seeds_drawn = np.stack([np.bincount(rng.integers(3, size=3), minlength=3) for _ in range(DRAWS)])
    weights = rows_drawn * rival.tokens_R
    weights = weights / weights.sum(axis=1, keepdims=True)
    false = 0
    for arm in arms:
        gaps = (weights @ (arm.rows_SR - rival.rows_SR).T * seeds_drawn / 3.0).sum(axis=1)
        low, high = np.quantile(gaps, [0.025, 0.975])
        false += low > 0.0 or high < 0.0
    assert false / len(arms) > 0.09
