"""Differences in accuracy by seed and question against hand-computed tables and SciPy, and the verdicts on them."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from eval.stats import sign_flip_p, standard_error
from llamafactory_adaptive.comparison.task_scores import (
    MEAN,
    Accuracy,
    Answers,
    accuracy,
    judge_tasks,
    mean_difference,
)


def never(gaps):
    """Stand in for the sign-flip test where p values of seeds and questions are looked at."""
    return 0.0


def answers(**tasks):
    values = {name: np.array(rows, float) for name, rows in tasks.items()}
    return Answers(tuple(range(len(next(iter(values.values()))))), values)


def planted(share, gain=0, seeds=4, questions=1000, task=0, seed=0, noise=10):
    """Answers of which a share is right and ``gain`` more; in each seed ``noise`` of them are turned round."""
    right = np.zeros((seeds, questions))
    order = np.random.default_rng(task).permutation(questions)
    for row in range(seeds):
        right[row, order[: int(share * questions) + gain]] = 1.0
    flips = np.random.default_rng((seed, task)).integers(questions, size=(seeds, noise))
    np.put_along_axis(right, flips, 1.0 - np.take_along_axis(right, flips, 1), 1)
    return right


def test_standard_errors_are_those_of_a_table_worked_out_by_hand():
    """Mean squares of [[1, 0, 0, -1], [1, 0, 1, 0]]: seeds 0.125, questions 5/12, both 1/6."""
    gaps = answers(boolq=[[1, 0, 0, -1], [1, 0, 1, 0]])
    own, found = accuracy(gaps), mean_difference(gaps)
    assert own.value == found.value == 0.25
    assert own.over_seeds == found.over_seeds == pytest.approx(math.sqrt(0.125 / 2))
    assert own.over_questions == pytest.approx(math.sqrt((5 / 12 - 1 / 6 / 2) / 4))
    assert found.over_questions == pytest.approx(math.sqrt((5 / 12 - 1 / 6 / 2) / 4 + 1 / 16))
    assert found.standard_error == pytest.approx(math.sqrt(0.0625 + 1 / 12 + 1 / 16))
    assert (found.seeds, found.questions) == (2, 4)


def test_the_error_of_one_arm_is_the_harnesss_with_one_seed_and_millers_clustered_one_with_many():
    """His sum over pairs within a question, here with the same answers in every seed; no adjustment for pairs."""
    right = np.random.default_rng(0).integers(2, size=50).astype(float)
    alone, thrice = accuracy(answers(boolq=[right])), accuracy(answers(boolq=[right] * 3))
    assert alone.standard_error == pytest.approx(standard_error(right.tolist()))
    residual_SQ = np.tile(right - right.mean(), (3, 1))
    clustered = math.sqrt((residual_SQ.sum(axis=0) ** 2).sum()) / residual_SQ.size
    assert thrice.standard_error == pytest.approx(clustered * math.sqrt(50 / 49))


def test_the_mean_over_tasks_weighs_each_task_alike():
    both = answers(boolq=[[1, 1, 1, 0]] * 2, copa=[[0, 1], [1, 0]])
    apart = [accuracy(both.of(name)) for name in ("boolq", "copa")]
    found = accuracy(both.of(MEAN))
    assert found.value == pytest.approx((0.75 + 0.5) / 2)
    assert found.over_questions == pytest.approx(math.hypot(*(each.over_questions for each in apart)) / 2)
    assert both.names() == ["boolq", "copa", MEAN]
    assert both.of("copa").names() == ["copa"]


def test_one_seed_has_the_interval_of_agresti_and_min():
    """12 questions won and 4 lost of 100; their interval adds half a question to each of four cells."""
    found = mean_difference(answers(boolq=[[1] * 12 + [-1] * 4 + [0] * 84]))
    b, c, n = 12.5, 4.5, 102
    assert found.standard_error == pytest.approx(math.sqrt(b + c - (b - c) ** 2 / n) / n, rel=0.03)
    assert found.value - found.reach(0.025) == pytest.approx(0.08 - scipy_stats.norm.isf(0.025) * found.standard_error)


def test_p_values_are_those_of_scipy_where_one_part_is_all():
    assert Accuracy(0.1, 0.03, 0.0, 5, 100).p_value() == pytest.approx(2 * scipy_stats.t.sf(0.1 / 0.03, 4), rel=1e-6)
    assert Accuracy(-0.1, 0.0, 0.04, 5, 100).p_value() == pytest.approx(2 * scipy_stats.norm.sf(2.5), rel=1e-6)
    assert Accuracy(0.0, 0.02, 0.04, 5, 100).p_value() == pytest.approx(1.0)


def test_the_power_is_that_of_scipys_normal_where_seeds_are_alike():
    found = Accuracy(0.0, 0.0, 0.02, 5, 100)
    for tests in (1, 6):
        asked = (scipy_stats.norm.isf(0.025 / tests) + scipy_stats.norm.isf(0.2)) * 0.02
        assert found.detectable(tests) == pytest.approx(asked)
        assert found.detectable_by_questions(tests) == pytest.approx(asked)
    assert Accuracy(0.0, 0.01, 0.02, 5, 100).detectable(1) > found.detectable(1)


def test_a_difference_as_large_as_the_power_says_is_found_four_times_in_five():
    """Estimates drawn around it, with the standard errors known."""
    over = Accuracy(0.0, 0.0, 0.02, 5, 100)
    drawn = np.random.default_rng(0).normal(over.detectable(1), 0.02, 1000)
    found = np.mean([Accuracy(value, 0.0, 0.02, 5, 100).reach(0.025) < value for value in drawn])
    assert found == pytest.approx(0.8, abs=0.04)


def test_few_questions_that_differ_are_judged_by_the_exact_test():
    """Five of five won: p 0.0625 (McNemar's exact test), though intervals of normal theory leave 0 out."""
    rival = np.zeros((3, 400))
    won = rival.copy()
    won[:, :5] = 1.0
    (found,) = judge_tasks({"lora": answers(boolq=rival), "igu": answers(boolq=won)}, "lora", 0.001, sign_flip_p)
    assert found.p_value == pytest.approx(scipy_stats.binomtest(0, 5).pvalue)
    assert (found.verdict, found.differ) == ("not decided", 5)


def test_agreement_on_few_questions_proves_nothing_and_on_many_it_is_equivalence():
    for questions, verdict in ((100, "not decided"), (1000, "equivalent")):
        same = answers(boolq=np.ones((3, questions)))
        (found,) = judge_tasks({"lora": same, "igu": same}, "lora", 0.01, sign_flip_p)
        assert (found.verdict, found.p_value) == (verdict, 1.0)


def test_the_four_verdicts_with_holm_over_arms_and_tasks():
    gains = {"lora": 0, "good": 40, "bad": -40, "same": 0, "odd": 10}
    arms = {
        name: answers(
            **{
                task: planted(0.5, gain, task=place, seed=i, noise=150 if name == "odd" else 10)
                for place, task in enumerate(("boolq", "copa"))
            }
        )
        for i, (name, gain) in enumerate(gains.items())
    }
    judged = {(each.arm, each.task): each for each in judge_tasks(arms, "lora", 0.015, never)}
    verdicts = {arm: judged[arm, "boolq"].verdict for arm in gains if arm != "lora"}
    assert verdicts == {"good": "better", "bad": "worse", "same": "equivalent", "odd": "not decided"}
    assert judged["good", MEAN].verdict == "better"
    assert {each.tests for each in judged.values() if each.task != MEAN} == {8}
    assert {each.tests for each in judged.values() if each.task == MEAN} == {4}
    smallest = min(each.p_value for each in judged.values() if each.task != MEAN)
    assert min(each.p_holm for each in judged.values() if each.task != MEAN) == pytest.approx(8 * smallest)


def test_seeds_are_paired_and_those_of_one_arm_alone_are_left_out():
    rival = Answers((1, 2, 3), {"boolq": np.eye(3, 30)})
    arm = Answers((3, 2, 9), {"boolq": np.eye(3, 30)[[2, 1, 0]]})
    (found,) = judge_tasks({"lora": rival, "igu": arm}, "lora", 0.01, never)
    assert (found.difference.seeds, found.difference.value, found.differ) == (2, 0.0, 0)
    assert judge_tasks({"lora": rival, "igu": Answers((9,), {"boolq": np.ones((1, 30))})}, "lora", 0.01, never) == []


def test_one_seed_decides_nothing():
    arms = {"lora": answers(boolq=np.zeros((1, 200))), "igu": answers(boolq=np.ones((1, 200)))}
    (found,) = judge_tasks(arms, "lora", 0.01, sign_flip_p)
    assert (found.verdict, found.p_holm) == ("not decided", None)
    assert found.p_value < 0.001


def test_arms_that_do_not_differ_are_seldom_called_better_or_worse():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(60):
        difficulty = rng.beta(0.3, 0.3, 100)
        arms = {name: answers(boolq=rng.random((4, 100)) < difficulty) for name in ("lora", "igu")}
        (found,) = judge_tasks(arms, "lora", 0.01, never)
        wrong += found.verdict in ("better", "worse")
    assert wrong <= 6, "of 60 at a level of 5 %, more have a chance of 3 %"
