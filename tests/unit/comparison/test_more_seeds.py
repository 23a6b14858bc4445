"""Student's t against SciPy, and the number of seeds against a simulation of what so many would decide."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from llamafactory_adaptive.comparison.differences import Difference, Estimate
from llamafactory_adaptive.comparison.more_seeds import (
    MOST_SEEDS,
    chance_to_decide,
    rate_seeds_to_decide,
    rows_too_few,
    seeds_to_decide,
    student_cdf,
    student_quantile,
)


EFFECT = 0.005


def seen(value, seed_sd, row_error=0.0, seeds=3):
    """A difference of which ``row_error`` is the standard error over rows."""
    estimate = Estimate(value, value, value, value, value)
    return Difference(estimate, estimate, 0.5, seeds, 100, seed_sd**2, 100 * row_error**2)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 99])
def test_student_is_scipys(freedom):
    for t in (0.0, 0.3, 1.0, 4.3, 30.0):
        assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
    for probability in (0.5, 0.95, 0.975, 0.9995):
        expected = stats.t.ppf(probability, freedom)
        assert student_quantile(probability, freedom) == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.002, -0.004, -0.008])
@pytest.mark.parametrize("seeds", [4, 12])
def test_the_chance_is_how_often_so_many_seeds_decide(value, seeds):
    """Intervals over normal seeds alone, by SciPy's quantiles; the variance that they estimate is known."""
    estimates = np.random.default_rng(0).normal(value, 0.006 / np.sqrt(seeds), 200_000)
    reach, reach_90 = (stats.t.ppf(p, seeds - 1) * 0.006 / np.sqrt(seeds) for p in (1 - 0.05 / 3 / 2, 0.95))
    decided = (abs(estimates) > reach) | (abs(estimates) < EFFECT - reach_90)
    assert chance_to_decide(seen(value, 0.006), EFFECT, 3, seeds) == pytest.approx(decided.mean(), abs=0.004)


def test_the_number_is_the_first_that_decides_four_times_in_five():
    for value in (0.0, -0.01):
        number = seeds_to_decide(seen(value, 0.006), EFFECT, 1)
        before = chance_to_decide(seen(value, 0.006), EFFECT, 1, number - 1)
        assert before < 0.8 <= chance_to_decide(seen(value, 0.006), EFFECT, 1, number)


def test_more_seeds_are_needed_for_more_noise_and_for_more_arms():
    numbers = [seeds_to_decide(seen(-0.007, sd), EFFECT, 1) for sd in (0.003, 0.006, 0.009)]
    assert numbers == sorted(set(numbers))
    assert seeds_to_decide(seen(-0.007, 0.006), EFFECT, 10) > numbers[1]
    assert seeds_to_decide(seen(-0.02, 0.001, seeds=5), EFFECT, 1) == 6, "more than have run"


def test_seeds_do_not_help_where_rows_leave_both_open():
    between, clear = seen(0.003, 0.002, row_error=0.002), seen(-0.02, 0.002, row_error=0.002)
    assert (seeds_to_decide(between, EFFECT, 1), rows_too_few(between, EFFECT, 1)) == (None, True)
    assert not rows_too_few(clear, EFFECT, 1)
    assert seeds_to_decide(clear, EFFECT, 1) < 10
    assert not rows_too_few(seen(0.0041, 0.002, row_error=0.002), EFFECT, 1), "apart from 0 at 5 %"
    assert rows_too_few(seen(0.0041, 0.002, row_error=0.002), EFFECT, 2), "and not so where two arms are judged"


def test_very_noisy_seeds_are_told_from_too_few_rows():
    noisy = seen(0.0, 0.1)
    assert (seeds_to_decide(noisy, EFFECT, 1), rows_too_few(noisy, EFFECT, 1)) == (None, False)
    assert chance_to_decide(noisy, EFFECT, 1, MOST_SEEDS) < 0.8


def test_seeds_that_do_not_differ_leave_it_to_the_rows():
    assert seeds_to_decide(seen(0.003, 0.0, row_error=0.002), EFFECT, 1) is None
    assert chance_to_decide(seen(0.003, 0.0, row_error=0.0005), EFFECT, 1, 4) == 1.0


def chosen(difference, by_rows, by_seeds, rate_seeds=1):
    return replace(difference, choices_over_rows=by_rows, choices_over_seeds=by_seeds, rate_seeds=rate_seeds)


@pytest.mark.parametrize("seeds", [3, 5, 20])
def test_the_chance_counts_what_the_choice_leaves_open(seeds):
    """Estimates drawn with the noise of seeds alone; the interval is that of all parts."""
    difference = chosen(seen(-0.012, 0.006, row_error=0.001), 0.001, 0.002)
    estimates = np.random.default_rng(0).normal(-0.012, 0.006 / np.sqrt(seeds), 40_000)
    by_seeds, by_rows = np.hypot(0.006 / np.sqrt(seeds), 0.002), np.hypot(0.001, 0.001)
    apart = np.hypot(stats.t.ppf(0.975, seeds - 1) * by_seeds, stats.norm.ppf(0.975) * by_rows)
    within = np.hypot(stats.t.ppf(0.95, seeds - 1) * by_seeds, stats.norm.ppf(0.95) * by_rows)
    decided = (np.abs(estimates) > apart) | (np.abs(estimates) + within < EFFECT)
    assert chance_to_decide(difference, EFFECT, 1, seeds) == pytest.approx(decided.mean(), abs=0.01)


def test_seeds_that_choose_decide_where_those_that_judge_cannot():
    open_choice = chosen(seen(-0.012, 0.003), 0.0, 0.012)
    assert seeds_to_decide(open_choice, EFFECT, 1) is None
    rate_seeds, seeds = rate_seeds_to_decide(open_choice, EFFECT, 1)
    surer = chosen(open_choice, 0.0, 0.012 / np.sqrt(rate_seeds), rate_seeds)
    assert 1 < rate_seeds <= 10
    assert chance_to_decide(surer, EFFECT, 1, seeds) >= 0.8
    assert rate_seeds_to_decide(seen(-0.012, 0.003), EFFECT, 1) is None, (
        "rates that were given cannot be chosen better"
    )


def test_what_rows_leave_open_in_the_choice_no_seed_decides():
    by_rows = chosen(seen(-0.012, 0.003), 0.012, 0.0)
    assert (seeds_to_decide(by_rows, EFFECT, 1), rate_seeds_to_decide(by_rows, EFFECT, 1)) == (None, None)
    assert rows_too_few(by_rows, EFFECT, 1)
