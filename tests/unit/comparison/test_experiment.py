"""Which runs are due, through a ledger of known losses: no training."""

import math

import pytest

from llamafactory_adaptive.comparison.arms import GridPoint
from llamafactory_adaptive.comparison.experiment import Design
from tests.unit.comparison.world import RATES, World


def test_each_arm_runs_its_grid_with_the_seeds_that_choose_and_others_at_its_best_rate():
    world = World(Design(RATES, seeds=3, rate_seeds=2)).finish()
    lora = [(run.point.rate, run.seed) for run in world.made if run.arm == "lora"]
    assert lora == [(rate, seed) for rate in RATES for seed in (0, 1)] + [(2.0, 2), (2.0, 3), (2.0, 4)]
    assert len(world.made) == world.progress.design.fewest_runs(2) == 18
    finals = world.progress.finals("igu")
    assert {seed: outcome["dev"] for seed, outcome in finals.items()} == {2: 0.002, 3: 0.003, 4: 0.004}
    assert world.progress.choice("igu").curve == {
        GridPoint(rate): pytest.approx(abs(math.log2(rate / 2)) + 0.0005) for rate in RATES
    }


@pytest.mark.parametrize(("best", "tried", "edge"), [(16.0, [8.0, 16.0], True), (0.25, [0.5, 0.25], True),
                                                     (8.0, [8.0, 16.0], False), (2.0, [], False)])  # fmt: skip
def test_a_grid_whose_end_is_best_is_extended_by_factors_of_two_and_an_edge_is_told(best, tried, edge):
    world = World(Design(RATES, seeds=1, extensions=2), {"lora": best, "igu": 2.0}).finish()
    rates = [run.point.rate for run in world.made if run.arm == "lora"]
    assert rates == [*RATES, *tried, best]
    choice = world.progress.choice("lora")
    assert (choice.best, choice.at_the_edge) == (GridPoint(best), edge)


def test_grids_are_of_rates_and_alphas_and_only_rates_are_extended():
    world = World(Design(RATES, alphas=(8.0, 16.0), seeds=1, extensions=1), {"lora": 4.0, "igu": 2.0}).finish()
    points = [run.point for run in world.made if run.arm == "lora"]
    assert points == [GridPoint(rate, alpha) for alpha in (8.0, 16.0) for rate in RATES] + [
        GridPoint(8.0, 8.0), GridPoint(4.0, 8.0)]  # fmt: skip
    choice = world.progress.choice("lora")
    assert (choice.at_the_edge, choice.alpha_at_the_edge) == (False, True)


@pytest.mark.parametrize(("best", "tried"), [(2.0, [4.0, 1.0]), (4.0, [4.0, 8.0]), (1.0, [4.0, 1.0])])
def test_a_lone_rate_is_an_end_of_its_grid_and_is_extended(best, tried):
    world = World(Design((2.0,), seeds=1), {"lora": best, "igu": 2.0}).finish()
    assert [run.point.rate for run in world.made if run.arm == "lora"] == [2.0, *tried, best]
    alone = World(Design((2.0,), seeds=1, extensions=0)).finish()
    assert alone.progress.choice("lora").at_the_edge, "nothing tells that it is a good one"


@pytest.mark.parametrize("alphas", [(None,), (8.0,)])
def test_a_lone_alpha_was_not_tuned_and_is_no_end(alphas):
    assert not World(Design(RATES, alphas=alphas, seeds=1)).finish().progress.choice("lora").alpha_at_the_edge


def test_a_rate_that_diverges_is_given_up_after_its_first_seed_and_never_chosen():
    world = World(Design(RATES, seeds=2, rate_seeds=2, extensions=1), {"lora": 4.0, "igu": 4.0},
                  lambda run: run.point.rate > 2.0).finish()  # fmt: skip
    assert [run for run in world.made if run.point.rate == 4.0 and run.seed == 1] == []
    choice = world.progress.choice("lora")
    assert (choice.best, choice.curve[GridPoint(4.0)]) == (GridPoint(2.0), math.inf)
    assert not choice.at_the_edge


def test_an_arm_that_diverges_everywhere_has_no_best_rate_and_no_final_runs():
    world = World(Design(RATES, seeds=2), diverges=lambda run: run.arm == "igu").finish()
    assert world.progress.choice("igu").best is None
    assert world.progress.finals("igu") == {}
    assert len([run for run in world.made if run.arm == "igu"]) == 3


def test_a_point_where_a_seed_that_judges_diverges_is_out_and_the_next_best_is_judged():
    world = World(Design((1.0, 2.0, 4.0, 8.0), seeds=3), {"lora": 2.0, "igu": 2.1},
                  lambda run: (run.arm, run.point.rate, run.seed) == ("igu", 2.0, 2)).finish()  # fmt: skip
    choice = world.progress.choice("igu")
    assert (choice.best, choice.unstable) == (GridPoint(4.0), (GridPoint(2.0),))
    assert list(world.progress.finals("igu")) == [1, 2, 3]
    at_two = [run.seed for run in world.made if run.arm == "igu" and run.point.rate == 2.0]
    assert at_two == [0, 1, 2], "the third seed there is spared"
    assert world.progress.choice("lora").unstable == ()


def test_an_arm_of_which_a_seed_diverges_at_every_point_has_no_best_one():
    world = World(Design(RATES, seeds=2), diverges=lambda run: run.arm == "igu" and run.seed == 2).finish()
    assert world.progress.choice("igu").best is None
    assert len(world.progress.choice("igu").unstable) == 3


def test_adaptive_arms_with_more_parameters_than_plain_lora_are_given_up_and_smaller_ones_are_not():
    world = World(Design(RATES, seeds=2), parameters={"lora": 1000, "igu": 1001})
    assert world.progress.give_up_larger_arms() == {}, "nothing is known yet"
    world.finish()
    found = world.progress.give_up_larger_arms()
    assert found == world.progress.failed
    assert found["igu"].startswith("its adapter has 1,001 parameters and plain LoRA's has 1,000")
    assert world.progress.finals("igu") == {}, "what has run already is not judged"
    assert world.progress.give_up_larger_arms() == {}, "told once"
    assert World(Design(RATES), parameters={"lora": 1000, "igu": 1000}).finish().progress.give_up_larger_arms() == {}


def test_shorter_runs_choose_and_whole_ones_judge():
    world = World(Design(RATES, seeds=2, steps=100, steps_for_rates=20)).finish()
    assert {(run.steps, run.point.rate) for run in world.made if run.arm == "lora" and run.steps == 100} == {
        (100, 2.0)
    }
    assert len(world.made) == world.progress.design.fewest_runs(2) == 2 * (3 + 2)
    assert [run.steps for run in World(world.progress.design).progress.left()] == 2 * [20, 20, 20, 100, 100]


def test_runs_left_count_down_to_none():
    world = World(Design(RATES, seeds=3))
    left = [len(world.progress.left())]
    while due := world.progress.due():
        world.results[due[0]] = world.make(due[0])
        left.append(len(world.progress.left()))
    assert left == list(range(12, -1, -1))
