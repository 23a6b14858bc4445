"""Losses by hand, and what is no table of losses."""

import math

import numpy as np
import pytest

from llamafactory_adaptive.comparison.losses import Losses


def losses(*rows, seeds=None, tokens=(1.0, 3.0, 2.0)):
    return Losses(tuple(seeds or range(len(rows))), np.array(rows, dtype=float), np.array(tokens))


def test_the_figure_of_a_run_is_its_mean_over_answer_tokens():
    assert losses([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).by_seed() == pytest.approx([(1 + 6 + 8) / 6, 2.0])


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_run_with_a_row_that_is_not_finite_has_diverged_and_its_loss_is_infinite(wrong):
    some = losses([1.0, 1.0, 1.0], [1.0, wrong, 1.0])
    assert some.diverged
    assert some.by_seed() == (1.0, math.inf)
    assert not some.of_seeds([0]).diverged


def test_seeds_are_picked_in_the_order_asked_for():
    picked = losses([1.0] * 3, [2.0] * 3, [3.0] * 3, seeds=(7, 8, 9)).of_seeds([9, 7])
    assert (picked.seeds, picked.by_seed()) == ((9, 7), (3.0, 1.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": (0, 0)}, "a seed is there twice"),
        ({"seeds": (0, 1, 2)}, "is not \\(3 seeds, 3 rows\\)"),
        ({"tokens": (1.0, 2.0)}, "is not \\(2 seeds, 2 rows\\)"),
        ({"tokens": (1.0, 0.0, 2.0)}, "leave out those without"),
    ],
)
def test_losses_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        losses([1.0] * 3, [1.0] * 3, **arguments)
