"""Which runs are due, through a ledger of known losses: no training."""

import math

import pytest

from llamafactory_adaptive.comparison.arms import Arm, GridPoint
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.comparison.runner import Runner, hours
from llamafactory_adaptive.errors import CalibrationError


ARMS = [Arm("lora"), Arm("igu")]
RATES = (1.0, 2.0, 4.0)


class World:
    """Losses by arm, rate and seed; what was run, in order."""

    def __init__(self, design, best=None, diverges=lambda run: False):
        self.results, self.made, self.best, self.diverges = {}, [], best or {"lora": 2.0, "igu": 2.0}, diverges
        self.progress = Progress(design, ARMS, self.results.get, lambda outcome, half: outcome[half])

    def make(self, run, device=None):
        self.made.append(run)
        if self.diverges(run):
            return {"status": "diverged"}
        loss = abs(math.log2(run.point.rate / self.best[run.arm])) + 0.001 * run.seed
        return {"status": "done", "dev": loss, "test": loss + 1}

    def finish(self):
        while due := self.progress.due():
            self.results[due[0]] = self.make(due[0])
        return self


def test_each_arm_runs_its_grid_with_the_seeds_that_choose_and_all_seeds_at_its_best_rate():
    world = World(Design(RATES, seeds=3, rate_seeds=2)).finish()
    lora = [(run.point.rate, run.seed) for run in world.made if run.arm == "lora"]
    assert lora == [(rate, seed) for rate in RATES for seed in (0, 1)] + [(2.0, 2)]
    assert len(world.made) == world.progress.design.fewest_runs(2) == 14
    assert [outcome["dev"] for outcome in world.progress.finals("igu")] == pytest.approx([0.0, 0.001, 0.002])
    assert world.progress.choice("igu").curve == {
        GridPoint(rate): pytest.approx(abs(math.log2(rate / 2)) + 0.0005) for rate in RATES
    }


@pytest.mark.parametrize(("best", "tried", "edge"), [(16.0, [8.0, 16.0], True), (0.25, [0.5, 0.25], True),
                                                     (8.0, [8.0, 16.0], False), (2.0, [], False)])  # fmt: skip
def test_a_grid_whose_end_is_best_is_extended_by_factors_of_two_and_an_edge_is_told(best, tried, edge):
    world = World(Design(RATES, seeds=1, extensions=2), {"lora": best, "igu": 2.0}).finish()
    rates = [run.point.rate for run in world.made if run.arm == "lora"]
    assert rates == [*RATES, *tried]
    choice = world.progress.choice("lora")
    assert (choice.best, choice.at_the_edge) == (GridPoint(best), edge)


def test_grids_are_of_rates_and_alphas_and_only_rates_are_extended():
    world = World(Design(RATES, alphas=(8.0, 16.0), seeds=1, extensions=1), {"lora": 4.0, "igu": 2.0}).finish()
    points = [run.point for run in world.made if run.arm == "lora"]
    assert points == [GridPoint(rate, alpha) for alpha in (8.0, 16.0) for rate in RATES] + [GridPoint(8.0, 8.0)]


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
    assert world.progress.finals("igu") == []
    assert len([run for run in world.made if run.arm == "igu"]) == 3


def test_shorter_runs_choose_and_whole_ones_judge():
    world = World(Design(RATES, seeds=2, steps=100, steps_for_rates=20)).finish()
    assert {(run.steps, run.point.rate) for run in world.made if run.arm == "lora" and run.steps == 100} == {
        (100, 2.0)
    }
    assert len(world.made) == world.progress.design.fewest_runs(2) == 2 * (3 + 2)


def test_runs_left_count_down_to_none():
    world = World(Design(RATES, seeds=3))
    left = [world.progress.runs_left()]
    while due := world.progress.due():
        world.results[due[0]] = world.make(due[0])
        left.append(world.progress.runs_left())
    assert left == list(range(10, -1, -1))


# -- the loop --------------------------------------------------------------------------------------------------------


def runner(path, world, devices=(None,)):
    ledger = Ledger(path)
    world.progress.known = lambda run: ledger.get(run.key)
    return Runner(world.progress, ledger, world.make, lambda run: run.key, devices)


def test_what_the_ledger_holds_is_not_run_again_and_a_line_cut_by_a_kill_is(tmp_path):
    path, design = tmp_path / "ledger.jsonl", Design(RATES, seeds=2)
    first = World(design)
    runner(path, first).run()
    whole = path.read_text()
    path.write_text(whole[:-7])
    second = World(design)
    runner(path, second).run()
    assert second.made == first.made[-1:]
    assert path.read_text() == whole


def test_every_device_has_one_run_at_a_time_and_no_run_is_made_twice(tmp_path):
    world = World(Design(RATES, seeds=3))
    runner(tmp_path / "ledger.jsonl", world, ("0", "1", "2")).run()
    assert len(world.made) == len(set(world.made)) == 10


def test_an_arm_that_cannot_run_is_given_up_and_the_others_go_on(tmp_path, capsys):
    world = World(Design(RATES, seeds=2))
    make = world.make

    def fails(run, device):
        if run.arm == "igu":
            raise CalibrationError("out of memory")
        return make(run, device)

    world.make = fails
    runner(tmp_path / "ledger.jsonl", world).run()
    assert world.progress.failed == {"igu": "out of memory"}
    assert len(world.progress.finals("lora")) == 2
    assert "igu is given up: out of memory" in capsys.readouterr().err


def test_without_plain_lora_there_is_no_comparison(tmp_path):
    world = World(Design(RATES))

    def fails(run, device):
        raise CalibrationError("no such file")

    world.make = fails
    with pytest.raises(CalibrationError, match="no such file"):
        runner(tmp_path / "ledger.jsonl", world).run()


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 seconds"), (720, "12 minutes"), (12600, "3.5 hours")])
def test_times_are_written_as_a_person_says_them(seconds, words):
    assert hours(seconds) == words


def test_the_key_of_a_run_names_all_that_tells_it_apart():
    at = GridPoint(1.0)
    runs = [Run("a", at, 0, None), Run("b", at, 0, None), Run("a", GridPoint(2.0), 0, None),
            Run("a", GridPoint(1.0, 8.0), 0, None), Run("a", at, 1, None), Run("a", at, 0, 5)]  # fmt: skip
    assert len({str(run.key) for run in runs}) == len(runs)
