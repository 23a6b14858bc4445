"""The command ``compare`` on tiny models: runs and pages, in this process and in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml

from llamafactory_adaptive import cli
from llamafactory_adaptive.bridge import comparison
from llamafactory_adaptive.comparison.arms import choose_arms
from llamafactory_adaptive.comparison.experiment import Design
from llamafactory_adaptive.errors import CalibrationError
from tests.helpers.pretended_runs import NEVER_ENDS, pretend
from tests.helpers.processes import ROOT, processes_naming, wait_until_ended


pytestmark = pytest.mark.slow
PRETENDED = ROOT / "tests" / "helpers" / "pretended_runs.py"
SECRETS = {
    "hf_hub_token": "hf_secret_1",
    "hub_token": "hf_secret_2",
    "swanlab_lark_webhook_url": "https://hf_secret_3",
}


def command(yaml_settings, folder, *more):
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({**yaml_settings, **SECRETS}))
    return ["compare", str(path), "--out", str(folder / "compared"), "--arms", "uniform", "--rates", "0.01",
            "--seeds", "2", "--extensions", "0", "--held-out", "40", *more]  # fmt: skip


# A dynamic method, and a secret in an arm.
SEARCH = "search:adaptive_method=igu,adaptive_interval=1,hf_hub_token=hf_secret_4"


def test_the_command_compares_and_leaves_pages_and_the_same_command_runs_nothing_again(
    yaml_settings, in_this_process, tmp_path, capsys
):
    words = command(yaml_settings, tmp_path, "--arm", SEARCH, "ms_hub_token=hf_secret_5", "max_steps=10")
    assert cli.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "4 arms, 12 runs, and up to 0 more for each arm" in said
    assert "settings of the YAML that no run of a comparison uses: " in said
    assert in_this_process == []
    assert cli.main(words) == 0
    assert len(in_this_process) == 2 + 12, "the split, a look at the time, and the runs"
    made = json.loads((tmp_path / "compared" / "compare.json").read_text())
    arms = {arm["name"]: arm for arm in made["arms"]}
    assert arms["uniform"]["losses"] == pytest.approx(arms["lora"]["losses"], rel=1e-6), "uniform ranks are plain LoRA"
    assert arms["uniform"]["verdicts"]["lora"]["verdict"] == "equivalent"
    assert len({tuple(arms[name]["losses"]) for name in ("lora", "random", "search")}) == 3
    assert len(set(arms["search"]["mean_ranks"].values())) > 1, "igu moved ranks"
    assert arms["lora"]["steps"] == 10
    assert all(arm["equal_parameters"] for arm in arms.values())
    assert "uniform: equivalent to lora" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "compared" / "compare.html").read_text()
    kept = [path for path in (tmp_path / "compared" / "runs").iterdir() if (path / "adapter_config.json").is_file()]
    assert len(kept) == len(list((tmp_path / "compared" / "runs").iterdir())) == 8, "two seeds that judge, four arms"
    assert cli.main([*words, "--effect", "2%"]) == 0
    assert len(in_this_process) == 14
    assert "--effect was changed after the comparison had begun: 0.5 %, then 2 %" in capsys.readouterr().out
    for path in (tmp_path / "compared").rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path


def test_arms_that_need_a_higher_lowest_rank_than_the_yamls_have_it_and_are_told(
    yaml_settings, in_this_process, tmp_path, capsys
):
    words = command(yaml_settings, tmp_path, "--arms", "uniform,elalora,tsq", "adaptive_min_rank=0", "--dry-run")
    assert cli.main(words) == 0
    said = capsys.readouterr().err
    assert "adaptive_min_rank is higher than the YAML's, as their methods need: elalora (1), tsq (1)\n" in said
    assert "5 arms, " in said


def test_settings_of_the_yaml_that_are_of_no_method_are_told_with_the_arms_that_have_them(
    yaml_settings, in_this_process, tmp_path, capsys
):
    more = ["adaptive_granularity=type", "adaptive_budget_unit=ranks", "--arms", "by_type", "--dry-run"]
    assert cli.main([*command(yaml_settings, tmp_path), "finetuning_type=adaptive", *more]) == 0
    said = "that these arms alone have: adaptive_granularity (by_type, yaml), adaptive_budget_unit (yaml)\n"
    assert said in capsys.readouterr().err
    assert cli.main([*command(yaml_settings, tmp_path), "use_dora=true", *more]) == 0
    said = capsys.readouterr().err
    assert "that these arms alone have: adaptive_granularity (by_type)\n" in said
    assert re.search("that no run of a comparison uses: .*adaptive_budget_unit", said)


def test_a_trial_that_diverges_gives_no_estimate_and_is_not_kept(yaml_settings, monkeypatch, tmp_path):
    outcomes = [{"status": "diverged"}, {"status": "done", "training_seconds": 4.0, "steps": 4}]
    monkeypatch.setattr(comparison, "run_in_own_process", lambda *arguments: outcomes.pop(0))
    given = {**yaml_settings, "max_steps": 104}
    made = comparison.Comparison(given, choose_arms([], [], given), Design((0.01,)), tmp_path, 40)
    assert made.run_time(None) is None
    for where in ("from a trial", "from the ledger"):
        time = made.run_time(None)
        assert time.seconds(made.steps()) == pytest.approx(100.0, abs=2.0), f"a hundred steps of a second, {where}"


def test_an_arm_that_cannot_run_makes_the_command_fail_with_the_results_of_the_others(
    yaml_settings, monkeypatch, tmp_path, capsys
):
    def pretend(job, *more):
        if not hasattr(job, "batch_size"):
            return job.run()
        if job.settings.get("adaptive_method") == "uniform":
            raise CalibrationError("memory ran out")
        losses = np.random.default_rng(job.settings["seed"]).normal(2.0, 0.1, 20).tolist()
        return {"status": "done", "dev": losses, "test": losses, "seconds": 1.0, "training_seconds": 1.0, "steps": 4,
                "parameters": 8, "parameters_of_one_rank": 2, "ranks": {"q_proj": 4}}  # fmt: skip

    monkeypatch.setattr(comparison, "run_in_own_process", pretend)
    assert cli.main(command(yaml_settings, tmp_path)) == 1
    said = capsys.readouterr().out
    assert "could not be run: memory ran out" in said
    assert "random: equivalent to lora" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["finetuning_type=full"], "finetuning_type: 'full' is invalid: a comparison is of ways to train LoRA"),
        (["stage=pt"], "stage: 'pt' is invalid"),
        (["warmup_steps=4"], "warmup_steps: 4.* is invalid: the shortest runs of this comparison have 4 steps"),
        (["adaptive_calibration_dataset=rows,few"], "rows of it are held out to choose and to judge"),
        (["learning_rate=fast"], "learning_rate: 'fast' is invalid: must be a positive number"),
        (["--devices", "77"], "77 is no visible device"),
        (["--arms", "igo"], "--arms: 'igo' is invalid: must be one of lora"),
        (["stage=dpo"], "stage: 'dpo' is invalid: a comparison is by the loss of held-out answers"),
        (["--rates", "1e-3,0"], "--rates: '1e-3,0' is invalid: must be positive numbers"),
        (["--effect", "2"], "--effect: '2' is invalid: must be between 0 and 50%"),
        (["--arm", "odd:igu_beta1=0.5"], r"igu_beta1: 0.5 is invalid: it has no effect on plain LoRA \(arm odd\)"),
        (["--arm", "odd:adaptive_method=igu,igu_beta1=2"], r"igu_beta1: 2 .* \(arm odd\)"),
        (["packing=true"], "packing: True is invalid: losses are compared row by row"),
        (["deepspeed=ds.json"], "every run of a comparison has one process and one device"),
        (["--seeds", "0"], "--seeds: 0 is invalid: must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    more, said, yaml_settings, in_this_process, tmp_path, capsys
):
    assert cli.main(command(yaml_settings, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert in_this_process == []


def test_a_command_that_is_killed_in_a_run_goes_on_from_its_ledger(yaml_settings, monkeypatch, tmp_path):
    """Settings, rows and model make the same keys in another process; runs train nothing."""
    words, ledger = command(yaml_settings, tmp_path, "--seeds", "1"), tmp_path / "compared" / "ledger.jsonl"
    environment = {**os.environ, "PRETENDED_RUNS": "3"}  # the look at the time, and two runs
    script = [sys.executable, str(PRETENDED), *words]
    with subprocess.Popen(script, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert any(line.strip() == NEVER_ENDS for line in first.stdout), "it was to be killed in a run"
        first.send_signal(signal.SIGKILL)
    kept, made = ledger.read_text(), []
    monkeypatch.setattr(comparison, "run_in_own_process", lambda job, *more: made.append(job) or pretend(job))
    assert cli.main(words) == 0
    assert ledger.read_text().startswith(kept)
    assert len(kept.splitlines()) == 3
    assert (len(ledger.read_text().splitlines()), len(made)) == (1 + 6, 4), "neither rows nor runs are made again"
    assert (tmp_path / "compared" / "compare.html").is_file()


@pytest.mark.repeats
@pytest.mark.timeout(1800)  # many processes that start the host one after the other
def test_a_comparison_that_is_killed_goes_on_where_it_was_and_leaves_no_process(yaml_settings, tmp_path):
    words = [sys.executable, "-m", "llamafactory_adaptive.cli", *command(yaml_settings, tmp_path, "--seeds", "1")]
    ledger = tmp_path / "compared" / "ledger.jsonl"
    with subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as first:
        while not ledger.exists() or len(ledger.read_text().splitlines()) < 2:
            assert first.poll() is None
            time.sleep(0.05)
        time.sleep(2.0)  # into the next run
        first.send_signal(signal.SIGKILL)
    wait_until_ended(processes_naming(str(tmp_path)))
    kept = ledger.read_text()
    subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert ledger.read_text().startswith(kept)
    assert len(ledger.read_text().splitlines()) == 1 + 6, "a look at the time, and the runs"
    assert (tmp_path / "compared" / "compare.html").is_file()


@pytest.mark.repeats
def test_arms_that_score_draw_rows_from_what_all_arms_train_on(yaml_settings, in_this_process, tmp_path):
    arm = "scored:{adaptive_method: sensitivity, adaptive_calibration_dataset: rows}"
    assert cli.main(command(yaml_settings, tmp_path, "--arm", arm, "--seeds", "1")) == 0
    made = json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert next(arm for arm in made["arms"] if arm["name"] == "scored")["equal_parameters"]
    runs = [job.settings for job in in_this_process if job.settings.get("adaptive_method") == "sensitivity"]
    assert runs
    assert all("adaptive_calibration_dataset" not in settings for settings in runs)


@pytest.mark.repeats
@pytest.mark.timeout(1800)  # many processes that start the host one after the other
def test_an_interrupted_comparison_ends_at_once_and_leaves_no_process(yaml_settings, tmp_path):
    words = [sys.executable, "-m", "llamafactory_adaptive.cli", *command(yaml_settings, tmp_path)]
    ledger = tmp_path / "compared" / "ledger.jsonl"
    with subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as running:
        while not ledger.exists():
            assert running.poll() is None
            time.sleep(0.05)
        time.sleep(2.0)  # into the first run
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
    wait_until_ended(processes_naming(str(tmp_path)))
