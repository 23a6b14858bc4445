"""The check that a GPU's owner runs: its limits, its words where something is missing, and what it makes of output."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamafactory_adaptive.cli.parser import parse_command_line
from llamafactory_adaptive.comparison.arms import choose_arms
from llamafactory_adaptive.comparison.request import design_of
from tests.helpers.finished_comparison import OWN_KEYS, write_comparison


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


def script(check, name, monkeypatch):
    """The script of a part, with that part's own arguments as its command line."""
    words = list(check.PARTS[name].command)[1:]
    monkeypatch.setattr(sys, "argv", words)
    return importlib.import_module(Path(words[0]).stem)


@pytest.fixture
def worth_it(check, monkeypatch, tmp_path):
    """The comparison's part with its rows and its model made up; what it calls is parsed, and finds its result."""
    module = script(check, "worth-it", monkeypatch)
    called = []

    def run(command, check):
        called.extend(command[3:])
        write_comparison(Path(command[command.index("--out") + 1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.record, "smollm2", lambda: tmp_path / "model")
    monkeypatch.setattr(module.record, "source", lambda: None)  # which calls a program as well
    monkeypatch.setattr(module, "parts", lambda regime, data, model: ({"held_out": [], "train": []}, "generated"))
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.shipped, "_own_keys", lambda given: OWN_KEYS)
    module.main()
    return called


def test_the_comparison_has_arguments_that_the_command_takes_and_a_result_that_is_read(check, worth_it, tmp_path):
    arguments = parse_command_line(worth_it)
    design = design_of(arguments, None)
    assert [arm.name for arm in choose_arms(arguments.arms.split(","), arguments.arm, {})] == ["lora", "random", "igu"]
    assert len(design.grid) * design.rate_seeds + design.seeds == 2, "runs of an arm, for 150 seconds"
    assert design.extensions == 0
    figures = check.comparison_of(tmp_path, "")
    assert figures["device"] == "cpu"
    assert figures["steps"] == 12
    assert list(figures["arms"]) == ["lora", "random", "igu"]
    assert figures["arms"]["igu"]["best"]["rate"] == 4.0
    assert figures["arms"]["igu"]["loss"] == pytest.approx(1.0, abs=0.2)


@pytest.mark.usefixtures("worth_it")
def test_a_comparison_without_figures_fails_its_part(check, tmp_path):
    path = tmp_path / "worth_it_data_limited.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "comparison": {"arms": [{"name": "igu", "failed": "no memory"}]}}))
    with pytest.raises(ValueError, match="igu: no memory"):
        check.comparison_of(tmp_path, "")
    path.write_text(json.dumps({key: value for key, value in whole.items() if key != "comparison"}))
    with pytest.raises(KeyError, match="comparison"):
        check.comparison_of(tmp_path, "")


def test_the_overhead_has_variants_that_exist_and_a_result_that_is_read(check, monkeypatch, tmp_path):
    overhead = script(check, "overhead", monkeypatch)

    def take_turns(runs, steps):
        return {name: [1.0 + len(name)] * steps for name in runs}, dict.fromkeys(runs, 10)

    monkeypatch.setattr(overhead, "take_turns", take_turns)
    monkeypatch.setattr(overhead.record, "smollm2", lambda: tmp_path / "model")
    overhead.main()
    figures = check.overhead_of(tmp_path, "")
    assert list(figures["variants"]) == ["uniform", "uniform again", "igu", "adalora", "tsq ranks alone"]
    assert figures["variants"]["igu"]["time_ratio"] == pytest.approx(4 / 8)
    assert figures["targets"]["igu"] == 1.05


def test_the_calibration_has_arguments_that_its_script_takes_and_a_result_that_is_read(check, monkeypatch, tmp_path):
    calibration = script(check, "calibration", monkeypatch)
    seen = []
    batch = SimpleNamespace(input_ids=None, attention_mask=calibration.torch.ones(1, 5))
    monkeypatch.setattr(calibration.record, "smollm2", lambda: tmp_path / "model")
    monkeypatch.setattr(calibration.record, "read_rows", lambda *given: seen.append(given[-1]) or [{}] * given[-1])
    monkeypatch.setattr(calibration, "peak_megabytes", lambda kind, arguments: 2.0 if kind == "scoring" else 1.0)
    monkeypatch.setattr(calibration, "load", lambda model: (None, {}))
    monkeypatch.setattr(calibration, "batches_of", lambda rows, size: [batch])
    monkeypatch.setattr(calibration, "forward", lambda *given, **how: None)
    monkeypatch.setattr(calibration, "InputSecondMoments", lambda: lambda *given: None)
    monkeypatch.setattr(calibration, "theta", lambda *given: [1.0, 2.0])
    calibration.main()
    figures = check.calibration_of(tmp_path, "")
    assert seen == [64]
    assert figures["samples"] == 64
    assert figures["results"]["memory_ratio"] == 2.0
    assert figures["results"]["tau"] == 1.0


@pytest.mark.parametrize(("name", "file"), [("tests", "tests/e2e/test_gpu.py"), ("vllm", None)])
def test_the_tests_of_a_part_are_there_and_its_arguments_are_pytests(check, name, file):
    """A file in place of all tests, whose collection takes minutes."""
    words = [file if file and word == "tests" else word for word in check.PARTS[name].command]
    assert words[1:3] == ["-m", "pytest"]
    found = []
    collector = SimpleNamespace(pytest_collection_finish=lambda session: found.extend(session.items))
    assert pytest.main([*words[3:], "--collect-only", "--rootdir", str(check.ROOT)], plugins=[collector]) == 0
    assert found


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
