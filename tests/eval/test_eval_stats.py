"""Statistics against enumeration: every outcome is listed and counted."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest

from eval import stats


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (5, 0), (3, 4), (2, 9), (7, 7)])
def test_mcnemar_against_all_assignments(only_first, only_second):
    """Under the null each discordant row falls to either side alike: list all of them."""
    first = [1.0] * only_first + [0.0] * only_second + [1.0, 0.0]
    second = [0.0] * only_first + [1.0] * only_second + [1.0, 0.0]
    n = only_first + only_second
    gap = abs(only_first - only_second)
    extreme = sum(abs(n - 2 * sum(sides)) >= gap for sides in itertools.product((0, 1), repeat=n))
    found = stats.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(extreme / 2**n)


def test_mcnemar_of_many_rows_does_not_overflow():
    found = stats.mcnemar([1.0] * 1100 + [0.0] * 900, [0.0] * 1100 + [1.0] * 900)
    z = (1100 - 900 - 1) / math.sqrt(2000)  # normal approximation with continuity correction
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.03)


def test_standard_error_is_that_of_the_standard_library():
    values = [random.Random(1).random() for _ in range(17)]
    assert stats.standard_error(values) == pytest.approx(statistics.stdev(values) / math.sqrt(17))
    assert math.isnan(stats.standard_error([1.0]))


def test_mean_over_tasks_weighs_tasks_alike():
    value, error = stats.mean_over_tasks([[1.0, 1.0, 0.0, 0.0], [1.0] * 30 + [0.0] * 10])
    assert value == pytest.approx((0.5 + 0.75) / 2)
    both = statistics.variance([1.0, 1.0, 0.0, 0.0]) / 4 + statistics.variance([1.0] * 30 + [0.0] * 10) / 40
    assert error == pytest.approx(math.sqrt(both) / 2)


def test_bootstrap_against_every_resample():
    """Two tasks of three rows: all 27 x 27 resamples, listed."""
    first = {"a": [0.0, 1.0, 0.0], "b": [1.0, 0.0, 0.0]}
    second = {"a": [1.0, 1.0, 0.0], "b": [0.0, 1.0, 1.0]}
    gaps = [[s - f for f, s in zip(first[t], second[t], strict=True)] for t in first]
    exact = [
        (sum(one) / 3 + sum(two) / 3) / 2
        for one in itertools.product(gaps[0], repeat=3)
        for two in itertools.product(gaps[1], repeat=3)
    ]
    found = stats.paired_bootstrap(first, second, resamples=50_000)
    assert found.value == pytest.approx(1 / 3)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(exact, [2.5, 97.5])))
    below, above = (sum(sign * d >= -1e-12 for d in exact) / len(exact) for sign in (-1, 1))
    assert found.p_value == pytest.approx(2 * min(below, above), rel=0.05)


def test_bootstrap_pairs_rows_and_is_seeded():
    """A model against itself has no spread; a constant shift has none either."""
    rows = {"a": [random.Random(2).random() for _ in range(50)]}
    assert stats.paired_bootstrap(rows, rows) == stats.Difference(0.0, 0.0, 0.0, 1.0)
    shifted = stats.paired_bootstrap({"a": [0.0] * 20}, {"a": [1.0] * 20})
    assert (shifted.value, shifted.low, shifted.high, shifted.p_value) == (1.0, 1.0, 1.0, 1e-4)
    other = {"a": [value * 0.9 for value in rows["a"]]}
    assert stats.paired_bootstrap(rows, other, seed=3) == stats.paired_bootstrap(rows, other, seed=3)


def test_bootstrap_interval_covers_as_it_says():
    """95 of 100 intervals hold the true difference of 0.1, give or take."""
    draw = np.random.default_rng(5)
    held = 0
    for seed in range(100):
        first = draw.random(80)
        second = first + 0.1 + 0.3 * draw.standard_normal(80)
        d = stats.paired_bootstrap({"a": first.tolist()}, {"a": second.tolist()}, seed=seed, resamples=1000)
        held += d.low <= 0.1 <= d.high
    assert 88 <= held <= 100
