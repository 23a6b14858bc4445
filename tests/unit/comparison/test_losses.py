"""Losses by hand, and the choice of a setting: by one half of the rows, with the whole curve and its edges."""

import math

import numpy as np
import pytest

from llamafactory_adaptive.comparison.losses import Choice, CurvePoint, Edge, Losses, choose_setting


DEV = np.array([True, True, False])


def losses(*rows, seeds=None, tokens=(1.0, 3.0, 2.0)):
    return Losses(tuple(seeds or range(len(rows))), np.array(rows, dtype=float), np.array(tokens))


def flat(dev, test=1.0, seeds=(0,)):
    """The same losses for every seed, equal on all rows of a half."""
    return losses(*[[dev, dev, test]] * len(seeds), seeds=seeds)


def test_the_figure_of_a_run_is_its_mean_over_answer_tokens():
    assert losses([1.0, 2.0, 4.0], [2.0, 2.0, 2.0]).by_seed() == pytest.approx([(1 + 6 + 8) / 6, 2.0])
    assert losses([1.0, 2.0, 4.0]).on_rows(DEV).by_seed() == pytest.approx([7 / 4])


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


def test_the_dev_half_alone_chooses_and_the_whole_curve_is_kept():
    grid = {(2e-3,): flat(0.7, 9.0), (1e-3,): flat(0.8, 0.1), (4e-3,): flat(0.9, 0.2)}
    curve = tuple(
        CurvePoint((rate,), (0,), (pytest.approx(dev),), (test,))
        for rate, dev, test in ((1e-3, 0.8, 0.1), (2e-3, 0.7, 9.0), (4e-3, 0.9, 0.2))
    )
    assert choose_setting(grid, ["rate"], DEV) == Choice((2e-3,), False, (), curve)


def test_seeds_that_did_not_run_everywhere_choose_nothing():
    """The second rate would win by its two easy seeds; on the seed that both have it is worse."""
    easy = losses([0.9, 0.9, 0.9], [0.1, 0.1, 0.1], [0.1, 0.1, 0.1])
    choice = choose_setting({(1.0,): flat(0.8), (2.0,): easy}, ["rate"], DEV)
    assert choice.setting == (1.0,)
    assert choice.curve[1].dev == pytest.approx([0.9, 0.1, 0.1]), "the curve has all seeds"
    with pytest.raises(ValueError, match="no seed ran at every setting"):
        choose_setting({(1.0,): flat(0.8), (2.0,): flat(0.9, seeds=(1,))}, ["rate"], DEV)


@pytest.mark.parametrize("row", [0, 2])
def test_a_setting_at_which_any_run_diverged_is_not_chosen(row):
    broken = losses([0.1] * 3, [0.1] * 3)
    broken.rows_SR[1, row] = math.nan
    choice = choose_setting({(1.0,): flat(0.8), (2.0,): broken}, ["rate"], DEV)
    assert (choice.setting, choice.diverged) == ((1.0,), False)
    assert math.inf in choice.curve[1].dev + choice.curve[1].test


def test_an_arm_that_diverged_everywhere_is_known_and_has_no_edge():
    choice = choose_setting({(rate,): flat(math.nan) for rate in (1.0, 2.0)}, ["rate"], DEV)
    assert (choice.setting, choice.diverged, choice.edges) == ((1.0,), True, ())


def grid_with(best, alphas=(8.0, 16.0)):
    points = [(rate, alpha) for rate in (1e-4, 1e-3, 1e-2) for alpha in alphas]
    return {point: flat(0.5 if point == best else 0.9) for point in points}


@pytest.mark.parametrize(
    ("best", "edges"),
    [
        ((1e-4, 8.0), [("rate", 1e-4, "lowest"), ("alpha", 8.0, "lowest")]),
        ((1e-2, 16.0), [("rate", 1e-2, "highest"), ("alpha", 16.0, "highest")]),
        ((1e-3, 16.0), [("alpha", 16.0, "highest")]),
    ],
)
def test_edges_are_told_per_dimension(best, edges):
    choice = choose_setting(grid_with(best), ["rate", "alpha"], DEV)
    assert choice.edges == tuple(Edge(*edge) for edge in edges)


@pytest.mark.parametrize("alpha", [16.0, None])
def test_a_dimension_of_one_value_has_no_edge(alpha):
    choice = choose_setting(grid_with((1e-2, alpha), [alpha]), ["rate", "alpha"], DEV)
    assert choice.edges == (Edge("rate", 1e-2, "highest"),)


def test_a_best_value_next_to_one_that_diverged_is_no_edge():
    grid = {(1e-4,): flat(0.8), (1e-3,): flat(0.7), (1e-2,): flat(math.inf)}
    assert choose_setting(grid, ["rate"], DEV).edges == ()
