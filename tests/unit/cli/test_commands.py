"""The commands in this process: what they print, write and answer, and what they leave alone."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from peft import PeftConfig, get_peft_model

from llamafactory_adaptive import _bootstrap, cli
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.cli import app, doctor
from llamafactory_adaptive.cli.export import export
from llamafactory_adaptive.errors import CalibrationError, PlanError
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.plans import make_plan
from tests.helpers.runs import save_data, save_run
from tests.helpers.tiny import pruning_settings, settings, tiny_model


def failing(error):
    def command(_):
        raise error

    return command


def test_a_users_error_is_one_message_and_code_2_and_an_interruption_130(monkeypatch, capsys):
    monkeypatch.setattr(app, "doctor", failing(PlanError("there is no plan")))
    assert cli.main(["doctor"]) == 2
    assert "error: there is no plan" in capsys.readouterr().err
    monkeypatch.setattr(app, "doctor", failing(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    monkeypatch.setattr(app, "doctor", failing(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["doctor"])


# -- plan ------------------------------------------------------------------------------------------------------------


def test_plan_writes_the_ranks_it_prints_and_the_overrides_count(write, tmp_path, capsys):
    assert cli.main(["plan", str(write()), "--out", str(tmp_path / "ranks"), "lora_rank=6"]) == 0
    plan = load_plan(tmp_path / "ranks" / PLAN_FILE)
    assert (plan.method, plan.lora_rank) == ("random", 6)
    assert plan.budget()["left_parameters"] >= 0
    said = capsys.readouterr().out
    assert f"{plan.budget()['used_parameters']:,} of {plan.budget()['asked_parameters']:,}" in said
    assert "nothing was trained" in said
    assert "(for ranks that you edit, add adaptive_plan=" in said, "a random division has no scores to re-use"
    assert {path.name for path in (tmp_path / "ranks").iterdir()} == {PLAN_FILE, "adaptive_ranks.png"}
    assert not (tmp_path / "out").exists()


def test_plan_keeps_its_hands_off_a_trained_adapter(write, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter_model.safetensors").write_text("")
    assert cli.main(["plan", str(write())]) == 2
    assert "it holds a trained adapter with its plan" in capsys.readouterr().err
    assert not (tmp_path / "out" / PLAN_FILE).exists()


def test_plan_with_an_adapter_to_go_on_with_shows_its_ranks(write, tmp_path, capsys):
    assert cli.main(["plan", str(write(lora_rank=6)), "--out", str(tmp_path / "first"), "seed=7"]) == 0
    path = write(lora_rank=6, adapter_name_or_path=str(tmp_path / "first"))
    capsys.readouterr()
    assert cli.main(["plan", str(path), "--out", str(tmp_path / "second"), "seed=8"]) == 0
    first, second = (load_plan(tmp_path / name / PLAN_FILE).ranks() for name in ("first", "second"))
    assert first == second
    assert cli.main(["plan", str(write(lora_rank=6)), "--out", str(tmp_path / "third"), "seed=8"]) == 0
    assert load_plan(tmp_path / "third" / PLAN_FILE).ranks() != first, "drawn with another seed"
    told = capsys.readouterr()
    assert f"goes on with the adapter {tmp_path / 'first'} and its ranks; nothing is scored" in told.err
    assert "these ranks are those of adapter_name_or_path, and stay" in told.out


def test_plan_of_a_plain_run_says_that_there_is_none(write, capsys):
    assert cli.main(["plan", str(write(settings, finetuning_type="lora"))]) == 2
    assert "there are no ranks to plan" in capsys.readouterr().err


def test_plan_of_a_search_shows_its_schedule_and_writes_nothing(write, tmp_path, capsys):
    assert cli.main(["plan", str(write(pruning_settings))]) == 0
    said = capsys.readouterr().out
    assert "ranks are found during training; nothing was written" in said
    steps = [int(words[0]) for line in said.splitlines() if (words := line.split()) and words[0].isdecimal()]
    assert {2, 4, 6, 8} <= set(steps)
    assert not (tmp_path / "out").exists()


def test_plan_gives_peft_a_configuration_with_its_ranks(write, tiny_llama, tmp_path, capsys):
    path, folder = write(lora_dropout=0.1), tmp_path / "peft"
    words = ["plan", str(path), "--out", str(tmp_path / "ranks"), "--peft", str(folder)]
    assert cli.main(words) == 0
    ranks = load_plan(tmp_path / "ranks" / PLAN_FILE).ranks()
    config = PeftConfig.from_pretrained(folder)
    assert (config.lora_dropout, config.base_model_name_or_path) == (0.1, str(tiny_llama))
    model = get_peft_model(tiny_model(), config)
    made = {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in model.named_modules()
            if hasattr(layer, "lora_A")}  # fmt: skip
    assert made == ranks
    assert cli.main(words) == 2
    assert "it holds an adapter_config.json" in capsys.readouterr().err
    assert cli.main(["plan", str(write(pruning_settings)), "--peft", str(tmp_path / "other")]) == 2
    assert "these ranks are found during training" in capsys.readouterr().err


def test_plan_of_a_search_tells_of_a_learning_rate_that_is_low_for_it(write, capsys):
    path = write(pruning_settings, adaptive_method="adalora", learning_rate="1e-4", lora_alpha=16)
    assert cli.main(["plan", str(path)]) == 0
    told = capsys.readouterr()
    # Widths of 32 but for down_proj: 1443 / sqrt(32), twice for alpha over the starting rank.
    assert "learning_rate 0.0001 moves each component of Delta W at first as plain LoRA does at 2e-07" in told.out
    assert (
        "warning: learning_rate 0.0001 is low for this method: each component of Delta W moves at first 510 times less"
        in told.out
    )
    assert "try learning_rate: 0.001" in told.out
    assert "lora_alpha 16 is divided by the rank it starts from" in told.err
    for unlike in ("optim=sgd", "loraplus_lr_ratio=16"):
        assert cli.main(["plan", str(write(pruning_settings)), unlike, "adaptive_method=adalora"]) == 0
        assert "learning_rate" not in capsys.readouterr().out


def test_plan_of_a_search_without_max_steps_counts_the_rows(write, capsys):
    path = write(pruning_settings, max_steps=-1, num_train_epochs=2.0, per_device_train_batch_size=2)
    assert cli.main(["plan", str(path)]) == 0
    assert "about 24 steps, estimated from num_train_epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_steps": -1, "num_train_epochs": 2.0}, "an allocation every 3 steps (0.25 of an epoch), final from"),
        ({"max_steps": 60, "packing": True}, "the steps of an epoch follow from the data: 20 are taken here"),
    ],
)
def test_plan_of_a_search_by_epochs_counts_the_rows_or_says_what_it_takes(write, capsys, change, words):
    by_epochs = {"adaptive_interval": None, "adaptive_interval_epochs": 0.25, "per_device_train_batch_size": 2}
    assert cli.main(["plan", str(write(pruning_settings, **by_epochs, **change))]) == 0
    assert words in capsys.readouterr().out


# -- train, measure ---------------------------------------------------------------------------------------------------


def test_train_hands_the_words_over_to_the_host_with_the_hook_in_place(write, monkeypatch):
    from llamafactory import launcher

    heard = []
    monkeypatch.setattr(launcher, "launch", lambda: heard.append(list(sys.argv)))
    monkeypatch.setattr(launcher, "__file__", launcher.__file__)
    path = write()
    assert cli.main(["train", str(path), "lora_rank=6"]) == 0
    assert heard == [["llamafactory-cli", "train", str(path), "lora_rank=6"]]
    assert launcher.__file__ == _bootstrap.__file__, "what torchrun is told to run arms the hook"


def test_train_says_that_the_plugin_is_switched_off(write, monkeypatch, capsys):
    monkeypatch.setenv(_bootstrap.ENV_SWITCH, "0")
    assert cli.main(["train", str(write())]) == 2
    assert "LLAMAFACTORY_ADAPTIVE=0 switches the plugin off; unset it" in capsys.readouterr().err


@pytest.mark.parametrize("error", [None, CalibrationError("a module saw no token")], ids=["good", "bad"])
def test_the_measuring_process_answers_with_its_error(error, tiny_llama, data_dir, tmp_path, monkeypatch):
    from llamafactory_adaptive.bridge import child, measure_process
    from llamafactory_adaptive.bridge.checked_run import checked_run
    from llamafactory_adaptive.bridge.scoring_job import ScoringJob

    run = checked_run(settings(tiny_llama, data_dir, tmp_path / "out"), host_too=False)
    sent = ScoringJob.from_run(run, ["lm_head"], InputSecondMoments(), tmp_path / "statistics")
    assert sent.config.method == "sensitivity"
    watched = []

    def measure(job):
        assert job == sent
        assert watched == [tmp_path], "from here on it ends with its parent"
        if error:
            raise error

    monkeypatch.setattr(child, "read_job", lambda: json.dumps(sent.to_json()) + "\n")
    monkeypatch.setattr(child, "end_with_parent", watched.append)
    monkeypatch.setattr(measure_process, "run_measurement_job", measure)
    answer = tmp_path / "answer.json"
    assert cli.main(["measure", str(answer)]) == (2 if error else 0)
    assert (json.loads(answer.read_text()) if answer.exists() else None) == (error and {"error": str(error)})


# -- report, export, doctor -------------------------------------------------------------------------------------------


def test_report_tells_runs_that_ended_compares_them_and_shows_the_data_of_others(tmp_path, capsys):
    first, second = save_run(tmp_path / "a"), save_run(tmp_path / "b", make_plan((4, 4), method="random"))
    (tmp_path / "c").mkdir()
    save_data(tmp_path / "c", make_plan())
    assert cli.main(["report", str(first)]) == 0
    assert "standard error" not in capsys.readouterr().out
    assert cli.main(["report", str(first), str(tmp_path / "c"), str(second)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path / 'c'} (not finished)")
    assert said.index(f"{first}\n") < said.index(f"{second}\n") < said.index("standard error")


def test_a_reader_that_reads_no_further_is_no_error(tmp_path):
    command = [sys.executable, "-m", "llamafactory_adaptive.cli", "report", str(save_run(tmp_path / "a"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(120) == 0


def test_report_of_nothing_is_one_message(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"there is no run in {tmp_path}" in capsys.readouterr().err


def test_an_export_that_is_told_to_end_cleans_up_before_it_does(tmp_path, monkeypatch):
    cleaned = []

    def told_to_end(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # another one does not cut the cleaning up short
            cleaned.append(True)

    monkeypatch.setattr("llamafactory_adaptive.export.exporter.run_export", told_to_end)
    monkeypatch.setattr("llamafactory_adaptive.cli.export.export_request", lambda arguments: arguments)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        export(SimpleNamespace())
    assert (caught.value.code, cleaned, signal.getsignal(signal.SIGTERM)) == (143, [True], before)


@pytest.mark.parametrize(
    ("hooked", "states", "code"),
    [("True", {"a.b": "fits"}, 0), ("False", {"a.b": "fits"}, 2), ("True", {"a.b": "fits", "c": "has changed"}, 2)],
    ids=["good", "no hook", "a seam"],
)
def test_doctor_is_content_where_the_hook_is_active_and_every_seam_fits(hooked, states, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=f"{hooked}\n"))
    monkeypatch.setattr(doctor, "_host_states", lambda: (states, {}, {}))
    assert cli.main(["doctor"]) == code
    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("seam")] == list(states)
    assert ("llamafactory-cli lacks the hook: use `llamafactory-adaptive train`" in said) is (hooked == "False")


@pytest.mark.parametrize("there", [True, False])
def test_doctor_says_where_the_start_up_file_is_what_it_costs_and_how_it_is_switched_off(there, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda _: str(tmp_path))
    path = tmp_path / "llamafactory_adaptive_hook.pth"
    if there:
        path.write_text("")
    assert doctor._start_up_file() == path
    words = ("about a millisecond", "LLAMAFACTORY_ADAPTIVE=0 switches it off") if there else ("train` needs none",)
    line = doctor._start_up_line(str(path) if there else None)
    assert all(word in line for word in (str(tmp_path), *words))


def test_doctor_bears_a_python_that_does_not_start(monkeypatch, capsys):
    def late(*_, **__):
        raise doctor.subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(doctor.subprocess, "run", late)
    monkeypatch.setenv(_bootstrap.ENV_SWITCH, "off")
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr().out
    assert "did not start within 60 s" in said
    assert "start-up hook   NOT active  (LLAMAFACTORY_ADAPTIVE: off)" in said
    assert "seam " not in said, "what is switched off has none"
