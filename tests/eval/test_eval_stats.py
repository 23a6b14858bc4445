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
    result = stats.mcnemar(first, second)
    assert (result.only_first, result.only_second) == (only_first, only_second)
    assert result.p_value == pytest.approx(extreme / 2**n)


def test_mcnemar_of_many_rows_does_not_overflow():
    result = stats.mcnemar([1.0] * 1100 + [0.0] * 900, [0.0] * 1100 + [1.0] * 900)
    z = (1100 - 900 - 1) / math.sqrt(2000)  # normal approximation with continuity correction
    assert result.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.03)


def test_standard_error_is_that_of_the_standard_library():
    values = [random.Random(1).random() for _ in range(17)]
    assert stats.standard_error(values) == pytest.approx(statistics.stdev(values) / math.sqrt(17))
    assert math.isnan(stats.standard_error([1.0]))


def test_mean_over_tasks_weighs_tasks_alike():
    value, error = stats.mean_over_tasks([[1.0, 1.0, 0.0, 0.0], [1.0] * 30 + [0.0] * 10])
    assert value == pytest.approx((0.5 + 0.75) / 2)
    both = statistics.variance([1.0, 1.0, 0.0, 0.0]) / 4 + statistics.variance([1.0] * 30 + [0.0] * 10) / 40
    assert error == pytest.approx(math.sqrt(both) / 2)


def test_interval_against_every_resample():
    """Two tasks of three rows: all 27 x 27 resamples, listed."""
    gaps = [np.array([1.0, 0.0, 0.0]), np.array([-1.0, 1.0, 1.0])]
    exact = [
        (sum(one) / 3 + sum(two) / 3) / 2
        for one in itertools.product(gaps[0], repeat=3)
        for two in itertools.product(gaps[1], repeat=3)
    ]
    interval = stats.bootstrap_interval(gaps, resamples=50_000)
    assert interval == pytest.approx(tuple(np.percentile(exact, [2.5, 97.5])))


def difference(first, second, **settings):
    return stats.paired_difference({"a": first}, {"a": second}, **settings)


def test_differences_pair_rows_and_are_seeded():
    """A model against itself has no spread; a constant shift has none either."""
    values = [random.Random(2).random() for _ in range(50)]
    assert difference(values, values) == stats.Difference(0.0, None, None, 1.0, 0)
    shifted = difference([0.0] * 20, [1.0] * 20)
    assert (shifted.value, shifted.low, shifted.high, shifted.n_differ) == (1.0, 1.0, 1.0, 20)
    assert shifted.p_value == pytest.approx(2 / 2**20)
    other = [value * 0.9 for value in values]
    assert difference(values, other, seed=3) == difference(values, other, seed=3)


def test_interval_covers_as_it_says():
    """95 of 100 intervals hold the true difference of 0.1, give or take."""
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(100):
        first = rng.random(80)
        second = first + 0.1 + 0.3 * rng.standard_normal(80)
        d = difference(first.tolist(), second.tolist(), seed=seed, resamples=1000)
        held += d.low <= 0.1 <= d.high
    assert 88 <= held <= 100


@pytest.mark.parametrize(("won", "p_value"), [(1, 1.0), (4, 0.125), (5, 0.0625)])
def test_few_rows_are_no_finding(won, p_value):
    """One row won of one, four of four: as McNemar says, and no interval."""
    result = difference([0.0] * won + [1.0] * 3, [1.0] * won + [1.0] * 3)
    assert result.p_value == pytest.approx(p_value) == stats.mcnemar([0.0] * won, [1.0] * won).p_value
    assert (result.low, result.high, result.n_differ) == (None, None, won)


def listed_p(gaps):
    """Every assignment of signs to every row, zeros too, one by one."""
    parts = [value / len(gap) / len(gaps) for gap in gaps for value in gap]
    observed = abs(sum(parts))
    sums = [
        sum(sign * part for sign, part in zip(signs, parts, strict=True))
        for signs in itertools.product((1, -1), repeat=len(parts))
    ]
    return sum(abs(total) >= observed - 1e-12 for total in sums) / len(sums)


@pytest.mark.parametrize(
    "gaps",
    [
        [[0.0, 0.0, 0.0]],
        [[1.0, 0.0, -1.0, 1.0]],
        [[0.5, -0.25, 1.0], [1.0, 1.0, 0.0, -1.0, 1.0]],  # two tasks, several seeds, other lengths
        [[1 / 3, 1 / 3, -2 / 3, 1 / 3]],  # thirds, whose sums are not exact
    ],
)
def test_sign_flips_against_every_assignment(gaps):
    arrays = [np.array(gap) for gap in gaps]
    assert stats.sign_flip_p(arrays) == pytest.approx(listed_p(gaps))


def test_sign_flips_are_those_of_scipy():
    scipy = pytest.importorskip("scipy.stats")
    gap = np.random.default_rng(4).normal(0.3, 1, 12)
    theirs = scipy.permutation_test((gap,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    assert stats.sign_flip_p([gap]) == pytest.approx(theirs)


@pytest.mark.parametrize(("lost", "won"), [(30, 45), (10, 30), (40, 40)])
def test_drawn_sign_flips_near_the_exact_test(lost, won):
    """More rows than are listed: within four standard errors of McNemar's exact p value, and the same each time."""
    first, second = [1.0] * lost + [0.0] * won, [0.0] * lost + [1.0] * won
    exact = stats.mcnemar(first, second).p_value
    p_value = difference(first, second).p_value
    assert abs(p_value - exact) <= 4 * math.sqrt(exact * (1 - exact) / stats.RESAMPLES) + 2 / stats.RESAMPLES
    assert p_value == difference(first, second).p_value
    assert p_value >= 1 / (stats.RESAMPLES + 1)


def test_holm_by_hand():
    """Four values: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1 (raised to the one before); ties and a bound of 1."""
    assert stats.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.6, 0.6]) == [1.0, 1.0]
    assert stats.holm([0.01]) == [0.01]
    assert stats.holm([]) == []


@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_against_every_draw(n):
    """The share of all draws of k answers without replacement that hold a right one."""
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert stats.pass_at_k(right, n, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7", "18", "18"], 1), (["7", "18", "18", "7"], 0), (["18"], 0), (["", "", "18"], 2),
        (["-", "-", "7", "8"], 2), (["-", "", "-"], 0), (["8", "-", "-", "7", "7"], 3),
    ],
)  # fmt: skip
def test_majority_by_hand(answers, winner):
    assert stats.majority(answers, ("", "-")) == winner
