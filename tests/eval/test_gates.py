"""Conditions for exit code 0: what is refused before a run, and what fails after it."""

import argparse

import pytest

from eval import gates


def parsed(*words, models=("base", "mine", "mine", "other"), tasks=("gsm8k", "boolq"), base_row=True):
    parser = argparse.ArgumentParser()
    gates.add_arguments(parser)
    return gates.parse(parser.parse_args(words), models, tasks, base_row)


def told(*words, **settings):
    _, problems = parsed(*words, **settings)
    return problems


def test_conditions_are_read():
    conditions, problems = parsed("--fail-under", "gsm8k=35", "--fail-under", "mean=50.5",
                                  "--fail-if-worse-than", "base:1.5", "--fail-if-worse-than", "mine")  # fmt: skip
    assert problems == []
    assert conditions == gates.Gates(
        (gates.Floor("gsm8k", 35), gates.Floor("mean", 50.5)),
        (gates.Rival("base", 1.5), gates.Rival("mine", 0)),
        ("mine", "other"),
    )
    assert parsed(models=["base"])[0].judged == ("base",)  # alone it is the one that is meant


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--fail-under", "copa=1", "--fail-under copa=1: 'copa' is not asked; it must be mean or one of gsm8k, boolq"),
        ("--fail-under", "gsm8k", "it must be TASK=PERCENT, a number from 0 to 100"),
        ("--fail-under", "gsm8k=101", "it must be TASK=PERCENT"),
        ("--fail-under", "gsm8k=nan", "it must be TASK=PERCENT"),
        ("--fail-under", "=5", "'' is not asked"),
        ("--fail-if-worse-than", "nobody", "'nobody' is not asked; it must be one of base, mine, other"),
        ("--fail-if-worse-than", "base:x", "POINTS must be a number from 0 to 100; try --fail-if-worse-than base:1"),
        ("--fail-if-worse-than", "base:-1", "POINTS must be a number from 0 to 100"),
        ("--fail-if-worse-than", "base:inf", "POINTS must be a number from 0 to 100"),
        ("--fail-if-worse-than", "base:", "POINTS must be a number from 0 to 100"),
    ],
)
def test_conditions_that_cannot_be_judged(option, value, message):
    (problem,) = told(option, value)
    assert message in problem


def test_a_rival_needs_another_model_and_must_be_asked():
    (alone,) = told("--fail-if-worse-than", "base", models=["base"])
    assert "there is no other model to compare" in alone
    (unasked,) = told("--fail-if-worse-than", "base", base_row=False)
    assert "'base' is not asked; it must be one of mine, other" in unasked


def score(model, task, value, headline=True):
    return {"model": model, "task": task, "value": value, "headline": headline}


def pair(first, second, value, p_value):
    return {"first": first, "second": second, "mean_difference": {"value": value, "p_value": p_value}}


def test_a_floor_is_for_every_model_but_the_base():
    conditions, _ = parsed("--fail-under", "gsm8k=35", "--fail-under", "mean=50")
    scores = [score("base", "gsm8k", 0.1), score("mine", "gsm8k", 0.35), score("mine", "gsm8k", 0.0, headline=False),
              score("other", "gsm8k", 0.3499)]  # fmt: skip
    means = [{"model": "base", "value": 0.1}, {"model": "mine", "value": 0.42}, {"model": "other", "value": 0.5}]
    assert gates.failures(conditions, scores, means, []) == [
        "other has 34.99 % in gsm8k, less than the 35 % of --fail-under",
        "mine has 42.00 % in the mean over tasks, less than the 50 % of --fail-under",
    ]


@pytest.mark.parametrize(
    ("points", "p_value", "fails"),
    [(-2.0, 0.04, True), (-2.0, 0.06, False), (-0.5, 0.001, False), (-1.0, 0.001, False), (2.0, 0.001, False)],
)
def test_worse_by_more_than_the_margin_and_not_by_chance(points, p_value, fails):
    conditions, _ = parsed("--fail-if-worse-than", "base:1", models=["base", "mine"])
    for compared in (pair("base", "mine", points / 100, p_value), pair("mine", "base", -points / 100, p_value)):
        said = gates.failures(conditions, [], [], [compared])
        expected = (
            "mine is worse than base by 2.00 points in the mean over tasks, more than the 1 of --fail-if-worse-than "
            "(p 0.04, below 0.05)"
        )
        assert said == ([expected] if fails else [])


def test_the_base_is_not_judged_against_another():
    conditions, _ = parsed("--fail-if-worse-than", "mine")
    compared = [pair("base", "mine", 0.5, 0.001), pair("mine", "other", 0.1, 0.001), pair("base", "other", 0.6, 0.001)]
    assert gates.failures(conditions, [], [], compared) == []
