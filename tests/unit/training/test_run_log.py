"""What a run writes down: its log, and what makes a checkpoint its own."""

import json
from types import SimpleNamespace

import pytest

from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.training import run_log
from llamafactory_adaptive.training.checkpoint_files import LAYOUT_FILE
from llamafactory_adaptive.training.checkpoint_record import CheckpointRecord
from llamafactory_adaptive.training.fixed_ranks import FixedRanks
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.run_log import Counters, RunLog
from tests.helpers.dynamic import start_plan
from tests.helpers.tiny import tiny_model


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: now[0], time=lambda: now[0] + 7))
    return now


def lines(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


def test_lines_have_what_every_line_has_as_it_was_then(tmp_path, clock):
    log = RunLog("igu", 1.23456)
    log.write(tmp_path, {"step": 0, "event": "begin"})
    log.counters.steps, clock[0] = 4, 103.5
    for work in ("observing", "observing", "allocating"):
        log.spend(work, 0.25)
    for size in (5, 9, 2):
        log.hold("observing", {"host": size})
    log.hold("observing", {"device": 3})
    log.hold("allocating", {"host": 0})
    log.write(tmp_path, {"step": 4})
    none = {"modules_checked": 0, "steps": 0, "gradients_missing": 0, "observations": 0,
            "probes": 0, "allocations": 0, "largest_learning_rate": 0.0}  # fmt: skip
    begin, later = lines(tmp_path)
    assert 2**20 < begin.pop("peak_memory")["host"] <= later.pop("peak_memory")["host"] < 2**40
    assert begin.pop("memory") == {}
    assert later.pop("memory") == {"observing": {"host": 9, "device": 3}, "allocating": {"host": 0}}
    assert begin.pop("overhead") == {"planning": 1.235}
    assert later.pop("overhead") == {"planning": 1.235, "observing": 0.5, "allocating": 0.25}
    assert [begin, later] == [
        {"step": 0, "event": "begin", "method": "igu", "counters": none, "overhead_seconds": 1.235, "time": 107.0},
        {"step": 4, "method": "igu", "counters": {**none, "steps": 4}, "overhead_seconds": 1.985, "time": 110.5},
    ]
    assert log.seconds == 3.5
    log.seconds_before = 60.0
    assert log.seconds == 63.5
    assert "plan_origin" not in later
    RunLog("igu", 0.0, origin="given").write(tmp_path, {"step": 8})
    assert lines(tmp_path)[-1]["plan_origin"] == "given"


def test_warnings_are_told_at_once_and_kept_in_order(caplog):
    log = RunLog("igu", 0.0)
    log.warn("one")
    log.warn("two")
    assert log.warnings == ["one", "two"] == [record.getMessage() for record in caplog.records]


def test_counters_say_all_of_themselves():
    said = str(Counters(steps=3, largest_learning_rate=0.5))
    assert said == (
        "modules_checked=0, steps=3, gradients_missing=0, observations=0, probes=0, "
        "allocations=0, largest_learning_rate=0.5"
    )


# -- parts that write ------------------------------------------------------------------------------------------------


class Samples:
    """A selection that begins another subset at step 4."""

    def begins_at(self, step):
        return step == 4

    def figures(self, step):
        return {"subset": step // 4}


def state(step):
    return SimpleNamespace(global_step=step)


@pytest.mark.parametrize("selection", [None, Samples()], ids=["all samples", "chosen samples"])
@pytest.mark.parametrize("should_save", [True, False])
def test_a_run_on_a_plan_writes_it_and_says_when_samples_change(tmp_path, selection, should_save):
    plan = start_plan(tiny_model())
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=should_save)
    log = RunLog(plan.method, 0.0)
    ranks = FixedRanks(PlanGuard(plan, log), log, selection)
    ranks.announce(args, state(0))
    for step in range(1, 7):
        ranks.after_step(args, state(step), None, None)
    if not should_save:
        assert list(tmp_path.iterdir()) == []
        return
    assert load_plan(tmp_path / PLAN_FILE).ranks() == plan.ranks()
    told = [{key: line.get(key) for key in ("step", "event", "ranks_changed", "subset")} for line in lines(tmp_path)]
    begin = {"step": 0, "event": None, "ranks_changed": 14, "subset": None}
    if selection is None:
        assert told == [begin]
    else:
        change = {"step": 4, "event": "sampling", "ranks_changed": None, "subset": 1}
        assert told == [{**begin, "subset": 0}, change]


@pytest.mark.parametrize("layout", [None, {"processes": 2}])
def test_a_checkpoint_gets_the_ranks_then_in_use(tmp_path, layout):
    plans = [start_plan(tiny_model(), rank) for rank in (4, 3)]
    record = CheckpointRecord(lambda: plans[0], layout)
    record.save(tmp_path / "other", SimpleNamespace(should_save=False), state(1))
    assert not (tmp_path / "other").exists()
    for name in ("first", "second"):
        record.save(tmp_path / name, SimpleNamespace(should_save=True), state(1))
        assert load_plan(tmp_path / name / PLAN_FILE).ranks() == plans[0].ranks()
        assert (tmp_path / name / LAYOUT_FILE).exists() == (layout is not None)
        plans.reverse()
