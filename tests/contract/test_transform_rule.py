"""The rule that chooses the default of ``sensitivity_transform``, on invented figures, and the ledger behind it."""

import pytest

from tests.helpers.benchmarks import import_benchmarks


@pytest.fixture(scope="module")
def benchmarks():
    """The benchmark and what it shares."""
    return import_benchmarks("sensitivity_transforms", "short_runs")


def reading(top_three=0.1, halves=0.9, data_sets=None):
    return {"top_three": top_three, "halves": {"scores": halves}, "data_sets": {"scores": data_sets or halves}}


def worse(rival):
    return {f"over_{rival}": {"verdict": "worse on these rows"}}


@pytest.mark.parametrize(
    ("spent", "quality", "chosen"),
    [
        ({"log": reading(0.1, 0.95)}, {}, "log"),  # the steadiest
        ({"log": reading(0.1, 0.95), "per_type": reading(0.1, 0.99, 0.94)}, {}, "log"),  # by its least agreement
        ({"log": reading(0.1, 0.95), "none": reading(0.8, 1.0)}, {}, "log"),  # not if it concentrates
        ({"log": reading(0.14, 0.95)}, {}, "log"),  # within 5 points is as good
        ({"log": reading(0.16, 0.95), "per_type": reading(0.1, 0.91)}, {}, "per_type"),
        ({"log": reading(0.1, 0.95), "per_type": reading(0.1, 0.91)}, {"log": worse("none")}, "per_type"),
        ({"log": reading(0.1, 0.95), "per_type": reading(0.1, 0.91)}, {"log": worse("uniform")}, "per_type"),
        ({"log": reading(0.1, 0.95)}, {"log": worse("random")}, "log"),  # no part of the rule
        ({"no_first_token": reading(0.05, 1.0), "log": reading(0.1, 0.95)}, {}, "log"),  # shown only
    ],
)
def test_the_rule(spent, quality, chosen, benchmarks):
    readings = benchmarks["sensitivity_transforms"].READINGS
    table = {"a model": {name: spent.get(name, reading()) for name in readings}}
    arms = {"a model": {name: quality.get(name, {}) for name in readings}} if quality else {}
    assert benchmarks["sensitivity_transforms"].choose(table, arms)["chosen"] == chosen


def test_the_worst_model_decides(benchmarks):
    readings = benchmarks["sensitivity_transforms"].READINGS
    good = {name: reading() for name in readings} | {"log": reading(0.1, 0.99)}
    bad = {name: reading() for name in readings} | {"log": reading(0.1, 0.5)}
    choose = benchmarks["sensitivity_transforms"].choose
    assert choose({"one": good}, {})["chosen"] == "log"
    assert choose({"one": good, "other": bad}, {})["chosen"] == "none"


def test_the_ledger_goes_on_after_a_kill_in_the_middle_of_a_line(benchmarks, tmp_path):
    path, calls = tmp_path / "ledger.jsonl", []

    def compute():
        calls.append(1)
        return {"loss": len(calls)}

    ledger = benchmarks["short_runs"].Ledger
    assert [ledger(path).result({"seed": seed}, compute)["loss"] for seed in (0, 1, 0)] == [1, 2, 1]
    path.write_text(path.read_text()[:-5])
    assert [ledger(path).result({"seed": seed}, compute)["loss"] for seed in (0, 1, 1)] == [1, 3, 3]
