"""Arguments about tasks, checked before anything starts."""

import argparse
import sys

import pytest

from llamafactory_adaptive.comparison.request import add_comparison_arguments
from llamafactory_adaptive.comparison.task_request import PYTHON_VARIABLE, in_our_words, task_request_of
from llamafactory_adaptive.errors import AdaptiveConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)


def request(*words):
    parser = argparse.ArgumentParser()
    add_comparison_arguments(parser)
    return task_request_of(parser.parse_args(["my.yaml", "--out", "x", *words]))


def test_without_tasks_there_is_no_request():
    assert request() is None


def test_arguments_become_options_of_the_harness(tmp_path):
    made = request("--tasks", "gsm8k, boolq", "--eval-python", sys.executable, "--eval-data", str(tmp_path),
                   "--eval-protocol", "llm_adapters", "--eval-limit", "50", "--task-effect", "2.5%",
                   "--eval-args=--template training --system-prompt 'Be brief.'")  # fmt: skip
    assert made.tasks == ("gsm8k", "boolq")
    assert made.effect == pytest.approx(0.025)
    assert (made.protocol, made.data) == ("llm_adapters", str(tmp_path))
    assert str(made.python) == sys.executable, "a link stays: an environment is found by it"
    assert made.words == ("--tasks", "gsm8k,boolq", "--protocol", "llm_adapters", "--limit", "50", "--data-dir",
                          str(tmp_path), "--template", "training", "--system-prompt", "Be brief.")  # fmt: skip


def test_the_environment_is_found_by_the_variable(monkeypatch):
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    made = request("--tasks", "boolq")
    assert str(made.python) == sys.executable
    assert (made.effect, made.words[-1]) == (0.01, "lm_eval")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eval-limit", "4"], "--eval-limit: '4' is invalid: it has no effect without --tasks; try --tasks gsm8k"),
        (["--tasks", " ,"], "--tasks: ' ,' is invalid: must name a task; try --tasks gsm8k,boolq"),
        (["--tasks", "boolq"], "--eval-python: None is invalid: tasks are answered in an environment of their own"),
        (["--tasks", "boolq", "--eval-python", "/nowhere/python"], "--eval-python: '/nowhere/python' is invalid"),
        (["--tasks", "boolq", "--eval-data", "/nowhere"], "--eval-data: '/nowhere' is invalid: there is no"),
        (["--tasks", "boolq", "--task-effect", "0"], "--task-effect: '0' is invalid: must be percentage points"),
        (["--tasks", "boolq", "--task-effect", "much"], "--task-effect: 'much' is invalid"),
        (["--tasks", "boolq", "--eval-args=--limit 3"], "--limit is set by this command; try --eval-limit"),
        (["--tasks", "boolq", "--eval-args=--adapter=a=b"], "--adapter is set by this command; try leaving it out"),
        (["--tasks", "boolq", "--eval-args='"], "--eval-args: \"'\" is invalid: it cannot be split into words"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(words, said):
    python = [] if "--eval-python" in words or words[-1] == "boolq" else ["--eval-python", sys.executable]
    with pytest.raises(AdaptiveConfigError) as caught:
        request(*words, *(python if "--tasks" in words else []))
    assert said in str(caught.value)


def test_a_variable_that_names_no_program_is_told_by_its_name(monkeypatch):
    monkeypatch.setenv(PYTHON_VARIABLE, "/nowhere/python")
    with pytest.raises(AdaptiveConfigError, match=f"{PYTHON_VARIABLE}: '/nowhere/python' is invalid"):
        request("--tasks", "boolq")


def test_the_harnesss_options_have_our_names_in_messages():
    said = in_our_words("--data-dir: boolq reads x; --limit: 0 is invalid; --split dev; --base m: no config")
    assert (
        said == "--eval-data: boolq reads x; --eval-limit: 0 is invalid; --split dev; model_name_or_path m: no config"
    )
