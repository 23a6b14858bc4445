"""Where a process enters and leaves: what is checked before anything starts, and how errors end."""

import os
import subprocess
import sys

import pytest
import yaml
from accelerate import PartialState

from llamafactory_adaptive.bridge import launch
from llamafactory_adaptive.bridge.launch import checked_launch, exit_with, prepare_launch, with_clean_exit
from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError, PlanError, Problem, SeamError
from llamafactory_adaptive.files import LOCK_FILE
from llamafactory_adaptive.planning.sources import PlanSource
from tests.helpers.tiny import unmeasured_settings


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "FORCE_TORCHRUN", "NODE_RANK", "NNODES", "MAX_NNODES"):
        monkeypatch.delenv(name, raising=False)
    yield
    PartialState._reset_state()


@pytest.fixture
def write(tiny_llama, data_dir, tmp_path):
    def make(kind="adaptive", **more):
        settings = unmeasured_settings(tiny_llama, data_dir, tmp_path / "out", finetuning_type=kind, **more)
        path = tmp_path / f"{kind}.yaml"
        if kind != "adaptive":
            settings = {key: value for key, value in settings.items() if not key.startswith("adaptive_")}
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return make


def nothing():
    """Every seam fits."""


# -- how errors end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "workers_that_say_it"),
    [
        (AdaptiveConfigError([Problem("lora_rank", 0, "it must be more", "lora_rank: 8")]), ["0"]),
        (PlanError("no plan"), ["0"]),
        (GuardError("no gradient arrived"), ["0", "1"]),
    ],
    ids=["settings", "plan", "guard"],
)
def test_what_all_workers_know_one_of_them_says(error, workers_that_say_it, monkeypatch, capsys):
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as caught:
            exit_with(error)
        assert caught.value.code == 2
        if f"error: {error}" in capsys.readouterr().err:
            said.append(rank)
    assert said == workers_that_say_it


def test_a_program_gets_the_exception_and_a_command_line_a_message(capsys):
    def run_exp(args, callbacks):
        raise PlanError("no plan")

    wrapped = with_clean_exit(run_exp)
    with pytest.raises(PlanError):
        wrapped({"stage": "sft"})
    with pytest.raises(SystemExit) as caught:
        wrapped()
    assert caught.value.code == 2
    assert "error: no plan" in capsys.readouterr().err


def test_only_finished_workers_of_a_cpu_job_of_ours_leave_early(monkeypatch):
    left = []
    monkeypatch.setattr(launch, "_leave_without_finalizing", lambda: left.append(True))
    monkeypatch.setattr("llamafactory.hparams.read_args", lambda: given)
    wrapped = with_clean_exit(lambda args, callbacks: None)
    for given, rank, leaves in (
        ({"finetuning_type": "adaptive"}, "1", True),
        ({"finetuning_type": "lora"}, "1", False),
        ({"finetuning_type": "adaptive"}, None, False),
    ):
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
        wrapped()
        assert left == [True] * leaves, given
        left.clear()


# -- before anything starts ------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Launch with these words; returns whether the host was reached."""

    def start(*words, host=lambda: None, seams=nothing):
        reached = []
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", *words])
        checked_launch(lambda: reached.append(list(sys.argv)) or host(), seams)()
        return reached == [["llamafactory-cli", *words]]

    return start


def refuse():
    raise SeamError("a seam does not fit")


def test_runs_that_are_not_ours_are_not_looked_at(launched, write):
    plain = write("lora")
    for words in (["version"], ["train"], ["train", write(), "--help"], ["export", write()]):
        assert launched(*words, seams=refuse)
    assert launched("train", plain.replace("lora.yaml", "none.yaml"), seams=refuse)
    assert launched("train", plain, seams=refuse)


def test_an_adaptive_run_starts_where_it_can_and_not_where_a_seam_does_not_fit(launched, write, capsys):
    assert launched("train", write())
    with pytest.raises(SystemExit) as caught:
        launched("train", write(), seams=refuse)
    assert caught.value.code == 2
    assert "error: a seam does not fit" in capsys.readouterr().err


def test_overrides_of_the_command_line_are_checked(launched, write, capsys):
    with pytest.raises(SystemExit):
        launched("train", write(), "adaptive_min_rank=99")
    assert "adaptive_min_rank: 99 is invalid" in capsys.readouterr().err


def test_an_interruption_before_training_is_said_to_be_one(launched, write, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        launched("train", write(), seams=interrupted)
    assert caught.value.code == 130
    assert "interrupted before training began" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "error"), [("adaptive", SystemExit), ("lora", subprocess.CalledProcessError)])
def test_workers_that_failed_have_said_why(kind, error, launched, write, tmp_path):
    def torchrun():
        raise subprocess.CalledProcessError(7, "torchrun")

    with pytest.raises(error) as caught:
        launched("train", write(kind), host=torchrun)
    assert kind == "lora" or caught.value.code == 7


def test_a_user_error_of_a_worker_is_the_launchers_exit_code_too(launched, write, monkeypatch):
    def torchrun():
        with monkeypatch.context() as worker:
            worker.setenv("LOCAL_RANK", "1")
            with pytest.raises(SystemExit):
                exit_with(PlanError("no plan"))
        raise subprocess.CalledProcessError(1, "torchrun")

    with pytest.raises(SystemExit) as caught:
        launched("train", write(), host=torchrun)
    assert caught.value.code == 2
    assert not [name for name in os.environ if name == "LLAMAFACTORY_ADAPTIVE_LAUNCH"]


def test_words_of_this_process_are_as_they_were(write, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "its own word"])
    assert prepare_launch([write()], nothing)
    assert sys.argv == ["program", "its own word"]


@pytest.mark.parametrize(
    ("environment", "held_while_planning"),
    [
        ({"FORCE_TORCHRUN": "1"}, [True]),
        ({"FORCE_TORCHRUN": "1", "NNODES": "1", "NODE_RANK": "0"}, [True]),
        ({"FORCE_TORCHRUN": "1", "NNODES": "2"}, []),  # rank 0 will plan
        ({"FORCE_TORCHRUN": "1", "NNODES": "2", "NODE_RANK": "1"}, []),
        ({"FORCE_TORCHRUN": "1", "MAX_NNODES": "4"}, []),
        ({}, []),
    ],
)
def test_before_torchrun_on_one_node_the_plan_is_made_by_one_process_that_holds_the_folder(
    environment, held_while_planning, write, tmp_path, monkeypatch
):
    held = []
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "llamafactory_adaptive.planning.sources.fresh_plan",
        lambda config, run: held.append((tmp_path / "out" / LOCK_FILE).exists()) or PlanSource(None, "scored"),
    )
    assert prepare_launch([write()], nothing)
    assert held == held_while_planning
    assert not (tmp_path / "out" / LOCK_FILE).exists()
