"""``compare --tasks``: adapters of the runs that judge answer, in an environment of the harness without vLLM."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llamafactory_adaptive import cli
from llamafactory_adaptive.bridge import comparison, comparison_jobs, comparison_tasks
from tests.helpers.benchmarks import import_benchmarks
from tests.helpers.harness import FAKE_HARNESS, fake_environment, lines_of, task_rows
from tests.helpers.pretended_runs import pretend
from tests.helpers.processes import ROOT, processes_naming, wait_until_ended


pytestmark = pytest.mark.slow
PRETENDED = ROOT / "tests" / "helpers" / "pretended_runs.py"
QUESTIONS, ADAPTERS = 70, 6  # of both tasks; three arms with two seeds


@pytest.fixture
def environment(tmp_path):
    return fake_environment(tmp_path)


@pytest.fixture
def words(yaml_settings, environment, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump({**yaml_settings, "hf_hub_token": "hf_secret_1"}))
    rows = task_rows(tmp_path / "rows")
    return ["compare", str(path), "--out", str(tmp_path / "compared"), "--arms", "uniform", "--rates", "0.01",
            "--seeds", "2", "--extensions", "0", "--held-out", "40", "--tasks", "boolq,arc_easy",
            "--eval-python", str(environment[0]), "--eval-data", str(rows)]  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
    """Stand-ins for the runs of the comparison; what was run."""
    made = []

    def run(job, *more):
        made.append(job)
        return pretend(job, *more)

    for module in (comparison, comparison_tasks):
        monkeypatch.setattr(module, "run_in_own_process", run)
    return made


def document(tmp_path):
    return json.loads((tmp_path / "compared" / "compare.json").read_text())


def test_adapters_answer_and_verdicts_are_on_every_page_and_nothing_is_asked_again(
    words, environment, runs, tmp_path, capsys
):
    _, state = environment
    (state / "right.json").write_text('{"uniform": 1.0, "lora": 0.2}')
    assert cli.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "then 6 adapters, served beside their base, answer boolq (40 questions), arc_easy (30 questions)" in said
    assert (runs, lines_of(state / "asked")) == ([], [])
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert "6 adapters are left to answer boolq, arc_easy" in err
    assert "uniform: boolq 100.0 %, arc_easy 100.0 % (seeds 1, 2); 0 adapters to go" in err
    assert "uniform in boolq: better than lora: +" in out
    arms = {arm["name"]: arm for arm in document(tmp_path)["tasks"]["arms"]}
    assert arms["uniform"]["accuracy"]["boolq"]["value"] == 1.0
    assert arms["uniform"]["verdicts"]["mean"]["lora"]["verdict"] == "better"
    assert (arms["lora"]["seeds"], arms["lora"]["verdicts"]) == ([1, 2], {})
    assert len(lines_of(state / "asked")) == ADAPTERS * QUESTIONS
    starts = [json.loads(line) for line in lines_of(state / "calls")]
    assert sum(words[1] == "eval.run" for words in starts) == 3, "the adapters of an arm share a server"
    for name in ("compare.md", "compare.html"):
        assert "Mean over 2 tasks" in (tmp_path / "compared" / name).read_text()
    assert cli.main([*words, "--task-effect", "2"]) == 0
    assert len(lines_of(state / "asked")) == ADAPTERS * QUESTIONS
    assert (
        "--task-effect was changed after the comparison had begun: 1 point, then 2 points" in capsys.readouterr().out
    )
    (fixed, *_) = json.loads((tmp_path / "compared" / "starts.json").read_text())
    assert {"eval-protocol", "eval-data", "eval-args", "steps", "steps-for-rates", "rate-seeds", "alphas"} <= set(
        fixed
    )
    assert (fixed["effect"], fixed["eval-protocol"]) == (0.005, "lm_eval")
    shipped = import_benchmarks("shipped")["shipped"]
    held, lines = shipped.from_folder(tmp_path / "compared", "model")
    assert held["comparison"]["tasks"] == document(tmp_path)["tasks"], "benchmarks/ can ship it"
    assert sum("answers" in line["result"] for line in lines) == ADAPTERS
    for path in (tmp_path / "compared").rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path


@pytest.mark.repeats  # without a run: tests/unit/comparison
def test_an_arm_that_cannot_be_served_is_named_and_on_a_cpu_adapters_are_merged(
    words, environment, runs, tmp_path, capsys
):
    _, state = environment
    (state / "cpu").touch()
    (state / "broken").write_text("uniform")
    assert cli.main(words) == 1
    assert "could not be evaluated: --merged seed1: the fake server does not take it" in capsys.readouterr().out
    made = document(tmp_path)["tasks"]
    assert made["form"] == "merged"
    assert [("failed" in arm, "accuracy" in arm) for arm in made["arms"]] == [
        (False, True), (False, True), (True, False),
    ]  # fmt: skip
    assert sum(hasattr(job, "tokenizer") for job in runs) == 5, "after the first of uniform no other is merged"
    left = [path.name for path in (tmp_path / "compared" / "evaluations").glob("*-merged")]
    assert all(name.startswith("uniform") for name in left), "what was answered is no longer merged"


def drop_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("cpu", [False, pytest.param(True, marks=pytest.mark.repeats)])
def test_what_a_kill_left_out_of_the_ledger_is_read_again_not_asked_and_pages_hold_the_rest_meanwhile(
    cpu, words, environment, runs, tmp_path, monkeypatch, capsys
):
    _, state = environment
    if cpu:
        (state / "cpu").touch()
    assert cli.main(words) == 0
    whole, ledger, asked = document(tmp_path), tmp_path / "compared" / "ledger.jsonl", lines_of(state / "asked")
    drop_last_line(ledger)
    with monkeypatch.context() as patched:
        patched.setattr(comparison_tasks.TaskEvaluations, "run", lambda self, *_: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            cli.main(words)
    kept = document(tmp_path)["tasks"]
    assert [arm["seeds"] for arm in kept["arms"]] == [[1, 2], [1, 2], [1]]
    assert kept["notes"] == ["1 adapter has not answered yet, so that figures and verdicts of tasks may change"]
    runs.clear()
    assert cli.main(words) == 0
    assert document(tmp_path)["tasks"] == whole["tasks"]
    assert runs == [], "nothing is trained or merged"
    assert lines_of(state / "asked") == asked
    calls = [json.loads(line)[1] for line in lines_of(state / "calls")]
    assert calls.count("eval.run") == (6 if cpu else 3)


def trained(runs):
    return [(Path(job.settings["output_dir"]).name.split("-")[0], job.settings["seed"]) for job in runs
            if isinstance(job, comparison_jobs.RunJob)]  # fmt: skip


def test_a_run_without_its_adapter_is_made_again_only_where_it_has_yet_to_answer(words, runs, tmp_path, capsys):
    compared, without_tasks = tmp_path / "compared", words[: words.index("--tasks")]
    assert cli.main([*without_tasks, "--rate-seeds", "2", "--seeds", "1"]) == 0  # seeds 0 and 1 choose, 2 judges
    assert cli.main([*without_tasks, "--rate-seeds", "2", "--seeds", "1", "--rates", "0.01,0.02"]) == 0
    assert "runs made again" not in capsys.readouterr().err, "what judged at the first rate is there"
    runs.clear()
    (kept,) = compared.glob("runs/uniform-*")
    shutil.rmtree(kept)
    assert cli.main([*without_tasks, "--rate-seeds", "2", "--seeds", "1"]) == 0
    assert trained(runs) == [], "its losses are known"
    capsys.readouterr()
    assert cli.main([*words, "--rate-seeds", "1"]) == 0  # seed 1 judges now, whose adapters were not kept
    assert sorted(trained(runs)) == [("lora", 1), ("random", 1), ("uniform", 1), ("uniform", 2)]
    assert "as their adapters are not there and have yet to answer: 4" in capsys.readouterr().err
    assert [arm["seeds"] for arm in document(tmp_path)["tasks"]["arms"]] == [[1, 2]] * 3
    shutil.rmtree(compared / "runs")
    runs.clear()
    assert cli.main([*words, "--rate-seeds", "1"]) == 0
    assert trained(runs) == [], "all have answered"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "boolk,copa"], "'boolk' is no task of lm_eval"),
        (["--eval-python", "/nowhere/python"], "--eval-python: '/nowhere/python' is invalid"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_runs(more, said, words, runs, capsys):
    assert cli.main([*words, *more]) == 2
    assert said in capsys.readouterr().err
    assert runs == []


@pytest.mark.repeats
def test_evaluations_that_are_killed_go_on_and_leave_no_process(words, environment, tmp_path):
    _, state = environment
    (state / "delay").write_text("0.05")
    command = [sys.executable, str(PRETENDED), *words]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environ) as first:
        while len(lines_of(state / "asked")) < 2 * QUESTIONS + 10:
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
    wait_until_ended(processes_naming(str(FAKE_HARNESS)))
    ledger = (tmp_path / "compared" / "ledger.jsonl").read_text()
    assert ledger.count('"answers"') == 2, "both seeds of lora"
    (state / "delay").write_text("0")
    subprocess.run(command, cwd=ROOT, env=environ, check=True)
    assert (tmp_path / "compared" / "ledger.jsonl").read_text().startswith(ledger)
    assert ADAPTERS * QUESTIONS <= len(lines_of(state / "asked")) <= ADAPTERS * QUESTIONS + 1
    assert len(document(tmp_path)["tasks"]["arms"]) == 3
