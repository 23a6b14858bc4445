"""The loop of a comparison over runs whose losses are known: ledger, devices, failures and ends."""

import threading
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from llamafactory_adaptive.comparison import device_loop
from llamafactory_adaptive.comparison.device_loop import hours, makespan
from llamafactory_adaptive.comparison.experiment import Design
from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.comparison.runner import Runner
from llamafactory_adaptive.errors import CalibrationError, DivergedError, OtherProcessError, OutputError
from tests.unit.comparison.world import RATES, World


def runner(path, world, devices=(None,), **more):
    ledger = Ledger(path)
    world.progress.known = lambda run: ledger.get(asdict(run))
    return Runner(world.progress, ledger, world.make, asdict, devices, **more)


def failing(world, error, fails):
    """Let a world's runs fail with ``error`` where ``fails`` says so."""
    make = world.make

    def fail(run, device=None):
        if fails(run):
            world.made.append(run)
            raise error
        return make(run, device)

    world.make = fail
    return world


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


def test_every_device_has_one_run_at_a_time_all_are_used_and_no_run_is_made_twice(tmp_path):
    world, busy, lock, used = World(Design(RATES, seeds=3)), set(), threading.Lock(), []
    together, make = threading.Barrier(3), world.make

    def train(run, device):
        with lock:
            assert device not in busy
            busy.add(device)
            used.append(device)
            first = len(used) <= 3
        if first:
            together.wait(20)  # fails unless three runs are under way at once
        outcome = make(run, device)
        with lock:
            busy.remove(device)
        return outcome

    world.make = train
    runner(tmp_path / "ledger.jsonl", world, ("0", "1", "2")).run()
    assert len(world.made) == len(set(world.made)) == 12
    assert set(used[:3]) == {"0", "1", "2"}


def test_runs_under_way_are_counted_once(tmp_path, capsys):
    world = World(Design(RATES, seeds=1))
    runner(tmp_path / "ledger.jsonl", world, ("0", "1", "2", "3", "4", "5", "6", "7")).run()
    left = [int(line.split("; ")[1].split(" ")[0]) for line in capsys.readouterr().err.splitlines()]
    assert max(left) < 8
    assert left[-1] == 0


def test_an_arm_that_cannot_run_is_given_up_with_its_finished_seeds_and_the_others_go_on(tmp_path, capsys):
    world = failing(World(Design(RATES, seeds=3)), CalibrationError("out of memory"),
                    lambda run: run.arm == "igu" and run.seed == 3)  # fmt: skip
    runner(tmp_path / "ledger.jsonl", world).run()
    assert world.progress.failed == {"igu": "out of memory"}
    assert list(world.progress.finals("lora")) == [1, 2, 3]
    assert list(world.progress.finals("igu")) == [1, 2]
    assert "igu is given up: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OutputError("the disk is full"), OtherProcessError("the device is lost")])
def test_a_full_disk_and_a_lost_device_end_all(error, tmp_path):
    world = failing(World(Design(RATES, seeds=2)), error, lambda run: run.arm == "igu")
    with pytest.raises(type(error), match=str(error)):
        runner(tmp_path / "ledger.jsonl", world).run()
    assert len([run for run in world.made if run.arm == "igu"]) == 1, "no other run is tried"


def test_without_plain_lora_there_is_no_comparison(tmp_path):
    world = failing(World(Design(RATES)), CalibrationError("no such file"), lambda run: True)
    with pytest.raises(CalibrationError, match="no such file"):
        runner(tmp_path / "ledger.jsonl", world).run()


def test_plain_lora_that_diverges_everywhere_ends_all_before_other_arms_are_run(tmp_path):
    world = World(Design(RATES), diverges=lambda run: run.arm == "lora")
    with pytest.raises(DivergedError, match=r"lora diverged at every point tried \(1, 2, 4\).*give lower --rates"):
        runner(tmp_path / "ledger.jsonl", world).run()
    assert {run.arm for run in world.made} == {"lora"}


def test_an_arm_of_a_larger_budget_is_given_up_after_its_first_run(tmp_path, capsys):
    world = World(Design(RATES), parameters={"lora": 1000, "igu": 1001})
    runner(tmp_path / "ledger.jsonl", world).run()
    assert len([run for run in world.made if run.arm == "igu"]) == 1
    assert "igu is given up: its adapter has 1,001 parameters" in capsys.readouterr().err


def test_an_interrupt_ends_the_runs_under_way_and_waits_for_none(tmp_path, monkeypatch):
    world, ended, under_way = World(Design(RATES)), threading.Event(), threading.Barrier(3)

    def train(run, device):
        under_way.wait(20)
        assert ended.wait(20), "nobody ended this run"
        raise CalibrationError("killed")

    def interrupted(*arguments, **options):
        under_way.wait(20)
        raise KeyboardInterrupt

    world.make = train
    monkeypatch.setattr(device_loop, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path / "ledger.jsonl", world, ("0", "1"), end_runs=ended.set).run()
    assert ended.is_set()


def test_the_time_that_is_left_counts_short_runs_as_short_ones(tmp_path, monkeypatch, capsys):
    """A step takes a second: whole runs have 500 steps, those that choose 100."""
    clock = [0.0]
    monkeypatch.setattr(device_loop, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    world = World(Design((2.0,), seeds=2, steps=500, steps_for_rates=100, extensions=0))
    make = world.make

    def train(run, device):
        clock[0] += run.steps
        return make(run, device)

    world.make = train
    runner(tmp_path / "ledger.jsonl", world, length=lambda run: run.steps).run()
    said = [line.split("; ")[1] for line in capsys.readouterr().err.splitlines()]
    minutes = [2 * 500 + 100 + 2 * 500, 500 + 100 + 2 * 500, 100 + 2 * 500, 2 * 500]
    assert [line.split("about ")[1] for line in said[:4]] == [f"{seconds / 60:.0f} minutes" for seconds in minutes]
    assert said[-1] == "0 to go"


def test_the_last_of_some_jobs_ends_when_the_devices_that_are_free_are_through():
    assert makespan([1.0] * 5, 4) == 2.0
    assert makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0
    assert makespan([], 2) == 0.0


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 seconds"), (720, "12 minutes"), (12600, "3.5 hours")])
def test_times_are_written_as_a_person_says_them(seconds, words):
    assert hours(seconds) == words
