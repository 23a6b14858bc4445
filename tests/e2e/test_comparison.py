"""The command ``compare`` on tiny models: rows, runs and pages, in this process and in processes of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from datasets import load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llamafactory_adaptive import cli
from llamafactory_adaptive.bridge import comparison
from llamafactory_adaptive.bridge.comparison_jobs import HELD_OUT, TRAIN, RunJob, SplitJob, decode_job, encode_job
from llamafactory_adaptive.errors import CalibrationError
from tests.helpers.processes import ROOT, processes_naming, wait_until_ended
from tests.helpers.tiny import settings


pytestmark = pytest.mark.slow
COUNT = 96
WORDS = ["one", "two", "three", "four", "red", "blue", "sun", "moon"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows that are all different: the answer says the question's words in reverse."""
    folder = tmp_path_factory.mktemp("rows")
    questions = [[WORDS[(index >> shift) % 8] for shift in (0, 3, 6)] for index in range(COUNT)]
    rows = [{"instruction": " ".join(words), "input": "", "output": " ".join(words[::-1])} for words in questions]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "few.json").write_text(json.dumps(rows[:12]))
    names = {name: {"file_name": f"{name}.json"} for name in ("rows", "few")}
    (folder / "dataset_info.json").write_text(json.dumps(names))
    return folder


@pytest.fixture
def yaml_settings(tiny_llama, data, tmp_path):
    kept = settings(tiny_llama, data, tmp_path / "unused", dataset="rows", max_steps=4)
    return {key: value for key, value in kept.items() if not key.startswith("adaptive_")} | {"finetuning_type": "lora"}


def tokens(rows):
    return {tuple(row["input_ids"]) for row in rows}


def test_rows_are_split_once_into_those_that_train_choose_and_judge(yaml_settings, tmp_path):
    counts = SplitJob(yaml_settings, 40, str(tmp_path)).run()
    halves = json.loads((tmp_path / HELD_OUT).read_text())
    parts = [load_from_disk(str(tmp_path / TRAIN)), halves["dev"], halves["test"]]
    assert [len(part) for part in parts] == [counts["train"], counts["dev"], counts["test"]] == [COUNT - 40, 20, 20]
    seen = [tokens(part) for part in parts]
    assert sum(map(len, seen)) == COUNT, "no row is in two parts"
    assert len(set.union(*seen)) == COUNT
    for row in halves["dev"]:
        assert 0 < sum(label != -100 for label in row["labels"]) < len(row["labels"]), "answers alone take loss"


def test_rows_of_an_evaluation_set_are_held_out_and_not_trained_on(yaml_settings, tmp_path):
    with pytest.raises(CalibrationError, match="12 rows with an answer can be held out, and a comparison needs 40"):
        SplitJob({**yaml_settings, "eval_dataset": "few"}, 40, str(tmp_path)).run()
    counts = SplitJob({**yaml_settings, "eval_dataset": "rows", "dataset": "few,rows"}, 40, str(tmp_path)).run()
    halves = json.loads((tmp_path / HELD_OUT).read_text())
    train = load_from_disk(str(tmp_path / TRAIN))
    assert not tokens(train) & (tokens(halves["dev"]) | tokens(halves["test"]))
    assert counts["dev"] + counts["test"] == 40


def test_a_run_is_judged_row_by_row_with_the_adapter_that_it_saved(yaml_settings, tiny_llama, tmp_path):
    SplitJob(yaml_settings, 40, str(tmp_path)).run()
    folders = {"output_dir": str(tmp_path / "out"), "tokenized_path": str(tmp_path / TRAIN)}
    job = RunJob({**yaml_settings, **folders, "learning_rate": 0.1}, str(tmp_path / HELD_OUT), 8)
    outcome = decode_job(encode_job(job)).run()
    assert (outcome["status"], outcome["steps"]) == ("done", 4)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out").eval()
    assert outcome["parameters"] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    halves = json.loads((tmp_path / HELD_OUT).read_text())
    for half, rows in halves.items():
        for row, loss in zip(rows, outcome[half], strict=True):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                assert loss == pytest.approx(float(model(input_ids=ids, labels=labels).loss), rel=1e-4)


def test_a_run_that_diverges_is_said_to_and_is_not_an_error(yaml_settings, tmp_path):
    SplitJob(yaml_settings, 40, str(tmp_path)).run()
    folders = {"output_dir": str(tmp_path / "out"), "tokenized_path": str(tmp_path / TRAIN)}
    hot = {**yaml_settings, **folders, "learning_rate": 1e30, "max_grad_norm": 0.0}
    assert RunJob(hot, str(tmp_path / HELD_OUT)).run()["status"] == "diverged"


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the jobs here, as their processes would; the jobs that were run."""
    jobs = []

    def run(job, device, log):
        jobs.append(decode_job(encode_job(job)))
        return jobs[-1].run()

    monkeypatch.setattr(comparison, "run_in_own_process", run)
    return jobs


def command(yaml_settings, folder, *more):
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({**yaml_settings, "hf_hub_token": "hf_secret"}))
    return ["compare", str(path), "--out", str(folder / "compared"), "--arms", "uniform", "--rates", "0.01",
            "--seeds", "2", "--held-out", "40", *more]  # fmt: skip


def test_the_command_compares_and_leaves_pages_and_the_same_command_runs_nothing_again(
    yaml_settings, in_this_process, tmp_path, capsys
):
    words = command(yaml_settings, tmp_path)
    assert cli.main([*words, "--dry-run"]) == 0
    assert "3 arms, 6 runs: lora, random, uniform" in capsys.readouterr().err
    assert in_this_process == []
    assert cli.main(words) == 0
    assert len(in_this_process) == 2 + 6, "the split, a look at the time, and the runs"
    made = json.loads((tmp_path / "compared" / "compare.json").read_text())
    arms = {arm["name"]: arm for arm in made["arms"]}
    assert arms["uniform"]["losses"] == pytest.approx(arms["lora"]["losses"], rel=1e-6), "uniform ranks are plain LoRA"
    assert arms["uniform"]["verdicts"]["lora"]["verdict"] == "equivalent"
    assert arms["random"]["losses"] != arms["lora"]["losses"]
    assert all(arm["equal_parameters"] for arm in arms.values())
    assert "uniform: equivalent to lora" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "compared" / "compare.html").read_text()
    assert cli.main(words) == 0
    assert len(in_this_process) == 8
    for path in (tmp_path / "compared").rglob("*"):
        assert not path.is_file() or b"hf_secret" not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("more", "said"),
    [
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


@pytest.mark.repeats
def test_a_comparison_that_is_killed_goes_on_where_it_was_and_leaves_no_process(yaml_settings, tmp_path):
    words = [sys.executable, "-m", "llamafactory_adaptive.cli", *command(yaml_settings, tmp_path)]
    ledger = tmp_path / "compared" / "ledger.jsonl"
    with subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}) as first:
        while not ledger.exists() or len(ledger.read_text().splitlines()) < 3:
            assert first.poll() is None
            time.sleep(0.05)
        time.sleep(2.0)  # into the next run
        first.send_signal(signal.SIGKILL)
    wait_until_ended(processes_naming(str(tmp_path)))
    kept = ledger.read_text()
    subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert ledger.read_text().startswith(kept)
    assert len(ledger.read_text().splitlines()) == 8
    assert (tmp_path / "compared" / "compare.html").is_file()
