"""Holm by hand, and every verdict on losses of which it is known."""

import math

import numpy as np
import pytest

from llamafactory_adaptive.comparison.losses import Losses
from llamafactory_adaptive.comparison.verdicts import Judgement, holm, judge


def runs(shift=0.0, seed_sd=0.001, row_sd=0.01, seeds=5, seed=1, rows=200):
    """Losses of 1 + shift, with effects of seeds and rows."""
    rng = np.random.default_rng(seed)
    noise = seed_sd * rng.standard_normal((seeds, 1)) + row_sd * rng.standard_normal((1, rows))
    return Losses(tuple(range(seeds)), 1.0 + shift + noise + 0.01 * rng.standard_normal((seeds, rows)), np.ones(rows))


RIVAL = runs(seed=0)


def judged(*arms, effect=0.005, rival=RIVAL):
    return judge({"lora": rival, **{f"arm{number}": arm for number, arm in enumerate(arms)}}, "lora", effect)


def test_holm_by_hand():
    """Times 4, 3, 2, 1 from the smallest up: 0.04, 0.06, 0.06 (not less than before), 0.9."""
    assert holm([0.03, 0.9, 0.01, 0.02]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.4, 0.5]) == pytest.approx([0.8, 0.8])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("arm", "verdict"),
    [
        (runs(-0.02), "better"),
        (runs(0.02), "worse"),
        (runs(0.0), "equivalent"),
        (runs(-0.006, seed_sd=0.01), "not decided"),
        (Losses((0, 1), np.full((2, 200), math.nan), np.ones(200)), "diverged"),
    ],
)
def test_known_effects_get_their_verdicts(arm, verdict):
    (judgement,) = judged(arm)
    assert (judgement.arm, judgement.rival, judgement.verdict) == ("arm0", "lora", verdict)
    assert (judgement.difference is None) == (judgement.p_holm is None) == (verdict == "diverged")
    assert (judgement.seeds_to_decide is not None) == (verdict == "not decided")


def test_a_difference_within_the_effect_is_equivalent_and_known_to_be_there():
    (judgement,) = judged(runs(-0.01), effect=0.03)
    assert (judgement.verdict, judgement.different) == ("equivalent", True)
    (judgement,) = judged(runs(0.0), effect=0.03)
    assert (judgement.verdict, judgement.different) == ("equivalent", False)


def test_one_seed_decides_nothing_however_large_the_difference():
    for shift in (0.0, -0.5):
        (judgement,) = judged(runs(shift, seeds=1))
        assert (judgement.verdict, judgement.p_holm, judgement.seeds_to_decide) == ("not decided", None, None)
        assert judgement.difference.seeds == 1
        assert not judgement.different


def test_holm_corrects_for_the_arms_that_ran_with_several_seeds():
    diverged = Losses((0,), np.full((1, 200), math.inf), np.ones(200))
    arms = [runs(-0.006, seed_sd=0.003, seed=2), runs(-0.004, seed_sd=0.003, seed=3), runs(seeds=1), diverged]
    judgements = judged(*arms)
    p_values = [each.difference.p_value for each in judgements[:2]]
    assert [each.p_holm for each in judgements[:2]] == pytest.approx(holm(p_values))
    assert [each.tests for each in judgements] == [2, 2, 0, 0]


def test_what_is_different_alone_need_not_be_so_among_many():
    """The same arm beside others that differ by nothing."""
    arm, others = runs(-0.012, seed_sd=0.0045, seed=4), [runs(seed=seed) for seed in range(10, 25)]
    (alone,), (among, *_) = judged(arm), judged(arm, *others)
    assert (alone.verdict, among.verdict) == ("better", "not decided")
    assert among.p_holm == pytest.approx(16 * alone.p_holm)


def test_where_rows_are_too_few_it_is_said():
    (judgement,) = judged(runs(-0.003, seed_sd=0.0, row_sd=0.04, seed=5))
    assert (judgement.verdict, judgement.seeds_to_decide, judgement.more_rows) == ("not decided", None, True)


def test_a_rival_that_diverged_leaves_all_undecided():
    diverged = Losses((0,), np.full((1, 200), math.inf), np.ones(200))
    assert judged(runs(), diverged, rival=diverged) == [
        Judgement("arm0", "lora", "not decided", 0.005),
        Judgement("arm1", "lora", "diverged", 0.005),
    ]


def test_verdicts_are_the_same_every_time_and_in_the_order_of_the_arms():
    arms = [runs(0.02), runs(-0.02), runs()]
    assert judged(*arms) == judged(*arms)
    assert [each.verdict for each in judged(*arms)] == ["worse", "better", "equivalent"]
