"""The harness as a program in another environment: its facts, its messages in our words, kills."""

import os
import signal
import subprocess
import sys
import time

import pytest

from llamafactory_adaptive.bridge import harness as harness_module
from llamafactory_adaptive.bridge.child import Children
from llamafactory_adaptive.bridge.harness import Harness, is_complete
from llamafactory_adaptive.errors import EvaluationError
from tests.helpers.harness import FAKE_HARNESS, TASKS, fake_environment, lines_of, save_adapter, task_rows
from tests.helpers.processes import ROOT, processes_naming, wait_until_ended


@pytest.fixture
def environment(tmp_path):
    return fake_environment(tmp_path)


@pytest.fixture
def words(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows = task_rows(tmp_path / "rows")
    return ["--base", str(model), "--tasks", ",".join(TASKS), "--protocol", "lm_eval", "--data-dir", str(rows)]


@pytest.fixture
def harness(environment):
    return Harness(environment[0], Children(), {})


def check(harness, words, tmp_path):
    return harness.check([*words, "--out", str(tmp_path / "unused")], None)


def test_a_check_tells_how_many_questions_there_are_and_what_answers_depend_on(harness, words, tmp_path):
    facts = check(harness, [*words, "--limit", "35"], tmp_path)
    assert {name: task["questions"] for name, task in facts["tasks"].items()} == {"boolq": 35, "arc_easy": 30}
    assert facts["tasks"]["arc_easy"]["metric"] == "acc_norm"
    assert facts["on_cpu"] is False
    assert len(facts["settings"]["scored"]["boolq"]) == 64
    assert not (tmp_path / "unused").exists()


def test_what_the_harness_refuses_is_told_in_the_words_of_the_command(harness, words, tmp_path):
    wrong = ["--tasks", "boolk", "--limit", "0", "--startup-timeout", "-1"]
    with pytest.raises(EvaluationError) as caught:
        check(harness, [*words, *wrong], tmp_path)
    said = str(caught.value)
    assert "--tasks: 'boolk' is no task of lm_eval" in said
    assert "did you mean boolq?" in said
    assert "--eval-limit: 0 is invalid: must be at least 1" in said
    assert "--startup-timeout: -1.0 is invalid" in said


def test_an_environment_without_vllm_is_told(harness, environment, words, tmp_path):
    (environment[1] / "no_vllm").touch()
    with pytest.raises(EvaluationError, match=r"vllm cannot be imported in this environment .*install it there"):
        check(harness, words, tmp_path)


def test_a_program_that_is_no_python_is_told(tmp_path, words):
    with pytest.raises(EvaluationError, match="gave no answer; is it the Python of `make eval-install`"):
        check(Harness("/bin/true", Children(), {}), words, tmp_path)


def test_an_installation_without_the_harness_is_told(tmp_path, monkeypatch, words):
    def missing(name):
        raise StopIteration

    monkeypatch.setattr(harness_module, "shipped_folder", missing)
    with pytest.raises(EvaluationError, match="the evaluation harness is not in this installation"):
        check(Harness("/bin/true", Children(), {}), words, tmp_path)


def test_values_are_by_question_and_a_finished_run_is_told(harness, environment, words, tmp_path):
    _, state = environment
    (state / "right.json").write_text('{"good": 1.0, "bad": 0.0}')
    models = [f"--adapter={name}={save_adapter(tmp_path / name)}" for name in ("good", "bad")]
    evaluation = [*words, *models, "--no-base-row", "--log-samples"], tmp_path / "out", None, tmp_path / "log"
    assert not is_complete(tmp_path / "out")
    harness.run(*evaluation)
    assert is_complete(tmp_path / "out")
    values = harness.values(tmp_path / "out")
    assert values["answers"]["good"]["boolq"] == {"metric": "acc", "values": [1.0] * 40, "n_cut": 0}
    assert values["answers"]["bad"]["arc_easy"]["values"] == [0.0] * 30
    assert "[1/1] good, bad" not in (tmp_path / "log").read_text(), "the server is a stand-in"


def test_a_failed_run_is_told_with_its_log(harness, environment, words, tmp_path):
    (environment[1] / "broken").write_text("bad")
    bad = ["--adapter", f"bad={save_adapter(tmp_path / 'bad')}", "--no-base-row", "--log-samples"]
    with pytest.raises(EvaluationError, match=r"the fake server does not take it \(its log: .*log\)"):
        harness.run([*words, *bad], tmp_path / "out", None, tmp_path / "log")


SCRIPT = """
import sys
from pathlib import Path
from llamafactory_adaptive.bridge.child import Children
from llamafactory_adaptive.bridge.harness import Harness
Harness(Path(sys.argv[1]), Children(), {}).run(sys.argv[4:], Path(sys.argv[2]), None, Path(sys.argv[3]))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.repeats)])
def test_a_command_that_is_ended_leaves_no_process_and_goes_on_with_what_was_answered(
    end, environment, words, tmp_path
):
    python, state = environment
    (state / "delay").write_text("0.05")
    adapter = ["--adapter", f"seed1={save_adapter(tmp_path / 'lora')}", "--no-base-row", "--log-samples"]
    command = [sys.executable, "-c", SCRIPT, str(python), str(tmp_path / "out"), str(tmp_path / "log"), *words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, *adapter], env=environ, stderr=subprocess.DEVNULL) as first:
        while len(lines_of(state / "asked")) < 10:
            assert first.poll() is None
            time.sleep(0.02)
        first.send_signal(end)
    wait_until_ended(processes_naming(str(FAKE_HARNESS)))
    kept = len(lines_of(state / "asked"))
    assert 10 <= kept < sum(TASKS.values())
    (state / "delay").write_text("0")
    subprocess.run([*command, *adapter], env=environ, check=True)
    assert sum(TASKS.values()) <= len(lines_of(state / "asked")) <= sum(TASKS.values()) + 1, "none asked twice but one"
    assert f"going on with the run in {tmp_path / 'out'}" in (tmp_path / "log").read_text()
