"""The check that a GPU's owner runs: its limits, its words where something is missing, and what it makes of output."""

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def check(monkeypatch, tmp_path):
    """The script, as on a machine with a GPU; results go to a folder of the test."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    module = importlib.import_module("gpu_check")
    monkeypatch.setattr(module, "gpu", lambda: "a GPU")
    monkeypatch.setattr(module.record, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    return module


def part(check, code, seconds=60, needs=lambda: None):
    return check.Part(
        seconds, [sys.executable, "-c", code], lambda folder, printed: {"printed": printed.strip()}, needs
    )


def test_without_a_gpu_it_says_so_in_one_line(check, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(check, "gpu", lambda: None)
    assert check.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith("gpu-check: this machine has no CUDA device")
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_parts_take_ten_minutes_at_most(check):
    assert sum(part.seconds for part in check.PARTS.values()) <= 600
    for part in check.PARTS.values():
        scripts = [word for word in part.command if word.startswith(("benchmarks/", "tests"))]
        assert scripts
        assert all((check.ROOT / word).exists() for word in scripts)


def test_every_part_has_an_entry_that_says_how_it_ended(check, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "PARTS", {
        "good": part(check, "print('figures')"),
        "bad": part(check, "import sys; print('oh'); sys.exit(3)"),
        "slow": part(check, "import time; time.sleep(60)", seconds=1),
        "missing": part(check, "", needs=lambda: "there is no such thing"),
    })  # fmt: skip
    assert check.main() == 1
    entries = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "good": "done", "bad": "failed with exit code 3", "slow": "stopped after its 1 seconds",
        "missing": "skipped because there is no such thing",
    }  # fmt: skip
    assert entries["good"]["figures"] == {"printed": "figures"}
    assert entries["bad"]["printed"] == "oh\n"


def test_results_of_the_parts_do_not_replace_recorded_ones(check, monkeypatch):
    monkeypatch.setattr(check, "PARTS", {"one": part(
        check, "import sys; sys.path.insert(0, 'benchmarks'); import record; print(record.RESULTS)")})  # fmt: skip
    entry = check.run_part(check.PARTS["one"])
    assert not entry["figures"]["printed"].endswith("benchmarks/results")


def test_outcomes_of_tests_are_read_from_what_pytest_prints(check):
    printed = "FAILED tests/e2e/test_gpu.py::test_a - assert 0\n1 failed, 4 passed, 2 skipped in 3.1s\n"
    assert check.tests_of(Path(), printed) == {
        "failed": 1, "passed": 4, "skipped": 2, "not_passed": ["tests/e2e/test_gpu.py::test_a"]}  # fmt: skip
