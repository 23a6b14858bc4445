"""Paired differences: by hand, against an implementation without vectors, against SciPy where it has the answer."""

import math

import numpy as np
import pytest
from scipy import stats

from llamafactory_adaptive.comparison.differences import SEED_DRAWS, paired_differences, variance_components
from llamafactory_adaptive.comparison.losses import Losses
from llamafactory_adaptive.errors import AdaptiveConfigError


def losses(rows_SR, tokens_R=None, seeds=None):
    rows_SR = np.asarray(rows_SR, dtype=float)
    tokens_R = np.ones(rows_SR.shape[1]) if tokens_R is None else tokens_R
    return Losses(tuple(seeds or range(len(rows_SR))), rows_SR, tokens_R)


def example(seeds=3, rows=40, seed=0, seed_sd=0.02, row_sd=0.05, both_sd=0.03):
    """A rival and an arm with effects of seeds, rows and both, and rows of different lengths."""
    rng = np.random.default_rng(seed)
    tokens_R = rng.integers(5, 50, rows).astype(float)
    rival_SR = rng.gamma(4.0, 0.25, rows) + 0.01 * rng.standard_normal((seeds, rows))
    effects = seed_sd * rng.standard_normal((seeds, 1)) + row_sd * rng.standard_normal(rows)
    arm_SR = rival_SR - 0.02 + effects + both_sd * rng.standard_normal((seeds, rows))
    return losses(rival_SR, tokens_R), losses(arm_SR, tokens_R)


def difference(rival, arm, **options):
    (found,) = paired_differences(rival, [arm], **options)
    return found


def interval(estimate):
    return estimate.low, estimate.high, estimate.low_90, estimate.high_90


def test_variance_components_by_hand():
    """Means of seeds 2 and 4, of rows 1.5 and 4.5; all residuals 1/2 in size, so that var(both) is 1."""
    between_seeds, between_rows = variance_components(np.array([[1.0, 3.0], [2.0, 6.0]]))
    assert (between_seeds, between_rows) == pytest.approx((2.0, 4.5 - 1.0 / 2))
    assert variance_components(np.array([[1.0, 3.0]])) == pytest.approx((0.0, 2.0))
    assert variance_components(np.array([[1.0, -1.0], [-1.0, 1.0]]))[1] == 0.0, "a variance is not negative"


def test_variance_components_are_unbiased():
    rng = np.random.default_rng(0)
    shape = (4000, 3, 30)
    z = (
        2.0 * rng.standard_normal((*shape[:2], 1))
        + rng.standard_normal((shape[0], 1, 30))
        + rng.standard_normal(shape)
    )
    means = np.mean([variance_components(each) for each in z], axis=0)
    assert means == pytest.approx([4.0 + 1.0 / 30, 1.0], rel=0.05)


def test_values_are_differences_of_means_over_tokens():
    rival, arm = example()
    token_means = [np.mean([np.repeat(row, rival.tokens_R.astype(int)) for row in x.rows_SR]) for x in (rival, arm)]
    found = difference(rival, arm)
    assert found.absolute.value == pytest.approx(token_means[1] - token_means[0])
    assert found.relative.value == pytest.approx(token_means[1] / token_means[0] - 1.0)
    assert (found.seeds, found.rows) == (3, 40)


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_and_p_value_match_an_implementation_without_vectors(seeds):
    rival, arm = example(seeds, rows=25)
    found = difference(rival, arm, seed=5, row_draws=60)
    rng = np.random.default_rng(5)
    rows_drawn = rng.integers(25, size=(60, 25))
    w = rival.tokens_R / rival.tokens_R.mean()
    least = sorted(rng.standard_t((w**2).sum() ** 2 / (w**4).sum(), 60))
    t = rng.standard_t(seeds - 1, (60, SEED_DRAWS)) if seeds > 1 else np.zeros((60, 1))
    mean_a, mean_b = np.mean(w * arm.rows_SR), np.mean(w * rival.rows_SR)
    influences = {
        "relative": (mean_a / mean_b - 1.0, w * (arm.rows_SR - mean_a / mean_b * rival.rows_SR) / mean_b),
        "absolute": (mean_a - mean_b, w * (arm.rows_SR - rival.rows_SR - (mean_a - mean_b))),
    }
    for name, (value, z) in influences.items():
        jackknifed = z * 25 / (25 - w)
        over_seeds = math.sqrt(variance_components(z)[0] / seeds)
        over_rows = math.sqrt(variance_components(jackknifed)[1] / 25)
        centred = jackknifed.mean(axis=0) - jackknifed.mean()
        samples = [centred[chosen] for chosen in rows_drawn]
        students = sorted(sample.mean() / (sample.std(ddof=1) / math.sqrt(25)) for sample in samples)
        students = [(min if b < 30 else max)(student, least[b]) for b, student in enumerate(students)]
        draws = [value - over_rows * students[b] + over_seeds * each for b in range(60) for each in t[b]]
        expected = np.quantile(draws, [0.025, 0.975, 0.05, 0.95])
        assert interval(getattr(found, name)) == pytest.approx(expected, rel=1e-9)
        if name == "relative":
            fewer = min(sum(draw <= 0 for draw in draws), sum(draw >= 0 for draw in draws))
            assert found.p_value == pytest.approx(min(1.0, 2 * (1 + fewer) / (len(draws) + 1)))


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_without_effects_of_rows_the_interval_is_students(seeds):
    """Equal tokens, and a difference that is the same on every row: what varies are the seeds."""
    rng = np.random.default_rng(seeds)
    rival = losses(np.ones((seeds, 30)))
    gaps = 0.02 + 0.01 * rng.standard_normal(seeds)
    found = difference(rival, losses(1.0 + np.repeat(gaps[:, None], 30, axis=1)))
    test = stats.ttest_1samp(gaps, 0.0)
    expected = (*test.confidence_interval(0.95), *test.confidence_interval(0.90))
    spread = expected[1] - expected[0]
    assert interval(found.absolute) == pytest.approx(expected, abs=0.03 * spread)
    assert found.p_value == pytest.approx(test.pvalue, rel=0.1)


def test_with_one_seed_the_interval_is_that_of_the_rows():
    rng = np.random.default_rng(3)
    rival = losses(np.ones((1, 200)))
    gaps = 0.004 + 0.05 * rng.standard_normal(200)
    found = difference(rival, losses(1.0 + gaps[None]))
    test = stats.ttest_1samp(gaps, 0.0)
    assert interval(found.absolute)[:2] == pytest.approx(test.confidence_interval(0.95), abs=0.0005)
    assert found.p_value == pytest.approx(test.pvalue, rel=0.15)
    assert (found.seeds, found.between_seeds) == (1, 0.0)


def test_skewed_rows_move_the_interval_to_the_side_of_the_long_tail():
    rng = np.random.default_rng(4)
    gaps = 0.05 * rng.exponential(size=60)
    found = difference(losses(np.ones((1, 60))), losses(1.0 + gaps[None])).absolute
    skewed = stats.bootstrap((gaps,), np.mean, method="BCa", rng=rng).confidence_interval
    student = stats.ttest_1samp(gaps, 0.0).confidence_interval(0.95)
    assert found.high > skewed.high > student.high, "where BCa goes, and a little further, as studentising does"
    assert found.low == pytest.approx(student.low, abs=0.001), "no nearer than Student's"


def test_few_long_rows_widen_the_interval():
    """Three of 40 rows have 50 times the tokens: the interval is wider than Student's, and so mostly holds 0."""
    rng, tokens_R = np.random.default_rng(5), np.where(np.arange(40) < 3, 1000.0, 20.0)
    widths, values = [], []
    for _ in range(200):
        gaps = 0.05 * rng.standard_normal(40)
        found = difference(losses(np.ones((1, 40)), tokens_R), losses(1.0 + gaps[None], tokens_R), row_draws=500)
        widths.append((found.absolute.high - found.absolute.low) / 2.0)
        values.append(found.absolute.value)
    assert np.mean(np.abs(values) > widths) < 0.1
    plain = stats.t.ppf(0.975, 39) * np.std(values)
    assert np.median(widths) > 1.2 * plain


def test_the_spread_over_rows_is_that_of_the_ratio_when_rows_are_drawn():
    rival, arm = example(seeds=1, rows=150)
    rng = np.random.default_rng(1)
    chosen = rng.integers(150, size=(4000, 150))
    sums = [(x.rows_SR[0] * x.tokens_R)[chosen].sum(axis=1) for x in (arm, rival)]
    found = difference(rival, arm)
    assert math.sqrt(found.between_rows / 150) == pytest.approx(float((sums[0] / sums[1]).std()), rel=0.05)


def test_swapping_arm_and_rival_turns_the_difference_round_and_scale_does_not_matter():
    rival, arm = example()
    one, other = difference(rival, arm).absolute, difference(arm, rival).absolute
    turned = (-one.value, -one.high, -one.low)
    assert (other.value, other.low, other.high) == pytest.approx(turned, abs=0.03 * (one.high - one.low))
    tenfold = [Losses(x.seeds, 10.0 * x.rows_SR, x.tokens_R) for x in (rival, arm)]
    assert interval(difference(*tenfold).relative) == pytest.approx(interval(difference(rival, arm).relative))


def test_pairs_are_the_common_seeds_whatever_their_order_and_company():
    rival, arm = example(seeds=3)
    alone = difference(rival, arm)
    shuffled = Losses((9, 2, 0, 1), np.concatenate([arm.rows_SR[:1] + 7.0, arm.rows_SR[[2, 0, 1]]]), arm.tokens_R)
    assert interval(difference(rival, shuffled).relative) == pytest.approx(interval(alone.relative))
    other = Losses((0, 1), arm.rows_SR[:2] ** 2, arm.tokens_R)
    assert paired_differences(rival, [other, arm])[1].p_value == pytest.approx(alone.p_value, rel=0.1)
    beside = paired_differences(rival, [rival, arm])[1]
    assert interval(beside.relative) == pytest.approx(interval(alone.relative))


def test_an_arm_that_is_its_rival_differs_by_nothing():
    rival, _ = example()
    found = difference(rival, rival)
    assert (*interval(found.relative), found.p_value) == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    pair = example()
    assert difference(*pair, seed=1) == difference(*pair, seed=1) != difference(*pair, seed=2)


def test_what_cannot_be_compared_is_refused():
    rival, arm = example()
    other_rows = Losses(arm.seeds, arm.rows_SR, arm.tokens_R + 1.0)
    other_seeds = Losses((7, 8, 9), arm.rows_SR, arm.tokens_R)
    diverged = Losses(arm.seeds, np.full_like(arm.rows_SR, np.nan), arm.tokens_R)
    without_loss = Losses(rival.seeds, np.zeros_like(rival.rows_SR), rival.tokens_R)
    for first, second, words in [
        (rival, other_rows, "not those of its rival"),
        (rival, other_seeds, "no common seed"),
        (rival, diverged, "a run diverged"),
        (without_loss, arm, "no difference can be told as a share"),
    ]:
        with pytest.raises(ValueError, match=words):
            difference(first, second)
    few = np.arange(40) < 19
    with pytest.raises(AdaptiveConfigError) as caught:
        difference(*(Losses(each.seeds, each.rows_SR[:, few], each.tokens_R[few]) for each in (rival, arm)))
    assert str(caught.value) == (
        "--held-out: 38 is invalid: each half of the held-out rows needs at least 20, and the one that judges has 19; "
        "try --held-out 400"
    )
