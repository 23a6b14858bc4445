"""Every verdict in words, letter by letter."""

from dataclasses import replace

import pytest

from llamafactory_adaptive.comparison.differences import Difference, Estimate
from llamafactory_adaptive.comparison.verdicts import Judgement
from llamafactory_adaptive.comparison.words import judgement_in_words, what_would_decide


def difference(value, low, high, low_90=0.0, high_90=0.0, seeds=5, p_value=0.2):
    estimate = Estimate(value, low, high, low_90, high_90)
    return Difference(estimate, estimate, p_value, seeds, 100, 1e-6, 1e-6)


SMALL = difference(-0.00104, -0.0051, 0.0033, -0.0042, 0.0023)
OPEN = difference(-0.003, -0.009, 0.003)
CASES = [
    (
        Judgement("igu", "lora", "better", 0.005, difference(-0.012, -0.016, -0.008), 0.01, 3),
        "igu: better than lora: -1.20 % (95 % interval -1.60 % to -0.80 %), by at least the 0.5 % that were to matter",
    ),
    (
        Judgement("igu", "lora", "worse", 0.005, difference(0.012, 0.008, 0.016), 0.01, 3),
        "igu: worse than lora: +1.20 % (95 % interval +0.80 % to +1.60 %), by at least the 0.5 % that were to matter",
    ),
    (
        Judgement("igu", "lora", "better", 0.005, difference(-0.006, -0.0101, -0.002), 0.01, 3),
        "igu: better than lora: -0.60 % (95 % interval -1.01 % to -0.20 %); whether by the 0.5 % that were to matter "
        "is open",
    ),
    (
        Judgement("igu", "lora", "equivalent", 0.005, SMALL, 0.6, 3),
        "igu: equivalent to lora: -0.10 % (90 % interval -0.42 % to +0.23 %), within the 0.5 % that were to matter",
    ),
    (
        Judgement("igu", "lora", "equivalent", 0.02, SMALL, 0.04, 3),
        "igu: equivalent to lora: -0.1 % (90 % interval -0.4 % to +0.2 %), within the 2 % that were to matter; "
        "a difference is there, but a smaller one (lower loss)",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005, OPEN, 0.6, 3, 12),
        "igu: not decided against lora: -0.30 % (95 % interval -0.90 % to +0.30 %); about 12 seeds would decide it",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005, OPEN, 0.6, 3, more_rows=True),
        "igu: not decided against lora: -0.30 % (95 % interval -0.90 % to +0.30 %); more held-out rows are needed: "
        "seeds alone cannot decide it",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005, OPEN, 0.6, 3),
        "igu: not decided against lora: -0.30 % (95 % interval -0.90 % to +0.30 %); not even 100 seeds would decide "
        "it: seeds differ by too much for an effect so small",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005, replace(OPEN, rate_seeds=1), 0.6, 3),
        "igu: not decided against lora: -0.30 % (95 % interval -0.90 % to +0.30 %); not even 100 seeds would decide "
        "it, with rates that 20 seeds chose: seeds differ by too much for an effect so small",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005, OPEN, 0.6, 3, rate_seeds_to_decide=(3, 8)),
        "igu: not decided against lora: -0.30 % (95 % interval -0.90 % to +0.30 %); about 8 seeds would decide it, "
        "with rates that 3 seeds chose (--rate-seeds)",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005, OPEN, 0.6, 3, far_seed=("lora", 2)),
        "igu: not decided against lora: -0.30 % (95 % interval -0.90 % to +0.30 %); seed 2 of lora ended far above "
        "the others, so that no number of seeds can be told",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005, difference(0.006, 0.00001, 0.012, p_value=0.049), 0.1, 3, 12),
        "igu: not decided against lora: +0.60 % (95 % interval +0.00 % to +1.20 %); one of 3 arms may differ so by "
        "chance; about 12 seeds would decide it",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.0005, replace(OPEN, seeds=1)),
        "igu: not decided against lora: -0.300 % (95 % interval over rows alone -0.900 % to +0.300 %); seeds were not "
        "varied, and another seed may tell otherwise: give at least 3",
    ),
    (
        Judgement("igu", "lora", "not decided", 0.005),
        "igu: not decided, as lora itself diverged at every setting tried; try lower rates",
    ),
    (
        Judgement("igu", "lora", "diverged", 0.005),
        "igu: diverged at every setting tried, so that it cannot be compared with lora; try lower rates",
    ),
]


@pytest.mark.parametrize(("judgement", "words"), CASES, ids=[words[:45] for _, words in CASES])
def test_a_judgement_in_words(judgement, words):
    assert judgement_in_words(judgement) == words


def test_a_difference_that_rounds_to_nothing_has_no_minus():
    nothing = Judgement("igu", "lora", "equivalent", 0.005, difference(-1e-6, -0.01, 0.01, -1e-6, 0.002), 1.0, 1)
    assert "lora: +0.00 % (90 % interval +0.00 % to +0.20 %)" in judgement_in_words(nothing)


DECIDING = ["about 12 seeds would decide it", "more held-out rows are needed: seeds alone cannot decide it",
            "not even 100 seeds would decide it: seeds differ by too much for an effect so small",
            "not even 100 seeds would decide it, with rates that 20 seeds chose: seeds differ by too much for an "
            "effect so small",
            "about 8 seeds would decide it, with rates that 3 seeds chose (--rate-seeds)",
            "seed 2 of lora ended far above the others, so that no number of seeds can be told",
            "one of 3 arms may differ so by chance; about 12 seeds would decide it",
            "seeds were not varied, and another seed may tell otherwise: give at least 3"]  # fmt: skip


def test_only_what_was_compared_and_is_not_decided_is_told_what_would_decide_it():
    told = [what_would_decide(judgement) for judgement, _ in CASES]
    compared = [judgement.verdict == "not decided" and judgement.difference is not None for judgement, _ in CASES]
    assert [bool(words) for words in told] == compared
    assert list(filter(None, told)) == DECIDING
