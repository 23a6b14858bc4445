"""What a run resumes from, and what of its settings decides that."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive.bridge.resuming import (
    checkpoint_to_resume,
    has_ended,
    layout,
    named_paths,
    refuse_finished_run,
    refuse_ranks_in_plain_run,
    what_the_host_resumes,
)
from llamafactory_adaptive.errors import AdaptiveConfigError, PlanError
from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE, STATE_JSON, write_digests


def test_the_layout_of_a_run_is_read_from_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    expected = {"deepspeed_stage": 2, "round_robin_gradients": True, "fsdp_version": 0, "processes": 2,
                "global_batch": 16}  # fmt: skip
    assert layout({"deepspeed": str(path)}) == expected
    batches = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    without = {"deepspeed_stage": None, "round_robin_gradients": False, "fsdp_version": 0, "processes": 2,
               "global_batch": 24}  # fmt: skip
    assert layout(batches) == without
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert layout(batches) == {**without, "fsdp_version": 2}


def test_a_zero_byte_in_the_settings_names_no_path():
    assert named_paths({"run_name": "a\0b", "output_dir": "out"}) == []


# -- which checkpoint ------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path, monkeypatch):
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def checkpoint(output, step, sealed=True, plan="{}"):
    folder = output / f"checkpoint-{step}"
    folder.mkdir()
    if plan:
        (folder / PLAN_FILE).write_text(plan)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "adapter_config.json").write_text("{}")
    save_file({"w": torch.ones(4)}, folder / "adapter_model.safetensors")
    if sealed:
        write_digests(folder)
    return folder


def spoil(folder):
    (folder / "trainer_state.json").write_text("{}")
    return folder


def resumed(output, **more):
    return checkpoint_to_resume({"output_dir": str(output), **more})


def test_the_newest_whole_checkpoint_is_taken_and_newer_damage_is_told(output, caplog):
    for step in (3, 12):
        checkpoint(output, step)
    assert resumed(output) == output / "checkpoint-12"
    spoil(checkpoint(output, 20))
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        assert resumed(output) == output / "checkpoint-12"
    assert "checkpoint-20 is damaged or was not written to its end" in caplog.text
    assert caplog.text.rstrip().endswith("resuming from checkpoint-12")


def test_where_no_checkpoint_is_whole_the_run_starts_afresh(output, caplog):
    spoil(checkpoint(output, 3))
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        assert resumed(output) is None
    assert caplog.text.rstrip().endswith("starting afresh")


def test_settings_that_start_afresh_or_name_a_checkpoint_are_followed(output):
    checkpoint(output, 3)
    checkpoint(output, 6)
    assert resumed(output, overwrite_output_dir=True) is None
    assert resumed(output, resume_from_checkpoint=False) is None
    assert resumed(output, overwrite_output_dir=True, resume_from_checkpoint=True) == output / "checkpoint-6"
    named = str(output / "checkpoint-3")
    assert resumed(output, resume_from_checkpoint=named) == Path(named)
    spoil(Path(named))
    with pytest.raises(PlanError, match=r"checkpoint-3 is damaged .*; resume from another checkpoint"):
        resumed(output, resume_from_checkpoint=named)


@pytest.mark.parametrize(
    ("requested", "said"), [(True, "there is no checkpoint in"), ("none", "there is no such folder")], ids=str
)
def test_a_checkpoint_that_is_not_there_is_refused(requested, said, output):
    with pytest.raises(AdaptiveConfigError, match=said):
        resumed(output, resume_from_checkpoint=requested)


def test_a_checkpoint_of_a_plain_run_is_left_to_the_host(output):
    plain = checkpoint(output, 3, sealed=False, plan=None)
    assert resumed(output) == plain


def test_a_checkpoint_without_digests_is_resumed_from_with_a_word(output, caplog):
    checkpoint(output, 3, sealed=False)
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        assert resumed(output) == output / "checkpoint-3"
    assert "has no digests: its files are there and readable" in caplog.text


def test_the_host_is_told_which_one_where_it_would_take_another(output):
    args = {"output_dir": str(output)}
    assert what_the_host_resumes(args, None) is args
    complete, _ = checkpoint(output, 3), spoil(checkpoint(output, 6))
    assert what_the_host_resumes(args, complete)["resume_from_checkpoint"] == str(complete)
    assert what_the_host_resumes(args, None)["resume_from_checkpoint"] is False
    assert what_the_host_resumes(args, output / "checkpoint-6") is args


def test_a_plain_run_does_not_go_on_from_live_ranks(output):
    args = {"output_dir": str(output), "do_train": True, "finetuning_type": "lora"}
    folder = checkpoint(output, 3)
    refuse_ranks_in_plain_run(args)
    (folder / STATE_JSON).write_text("{}")
    with pytest.raises(AdaptiveConfigError, match="is of a run that trains no plain LoRA, and would be resumed from"):
        refuse_ranks_in_plain_run(args)
    refuse_ranks_in_plain_run({**args, "overwrite_output_dir": True})
    refuse_ranks_in_plain_run({**args, "do_train": False})


def test_a_finished_run_is_not_scored_again(output):
    args = {"output_dir": str(output)}
    refuse_finished_run(args, None)
    (output / "adapter_model.safetensors").write_text("")
    with pytest.raises(AdaptiveConfigError, match="it holds a finished run"):
        refuse_finished_run(args, None)
    refuse_finished_run(args, output / "checkpoint-3")
    refuse_finished_run({**args, "overwrite_output_dir": True}, None)


@pytest.fixture
def ended(output):
    """A run of 6 steps, 2 epochs, that has ended, and its last checkpoint."""
    folder = checkpoint(output, 6)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 6, "epoch": 2.0}))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (output / name).write_text("")
    (output / LOG_FILE).write_text('{"event": "begin"}\n{"event": "end"}\n')
    return folder


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"max_steps": 6}, True),
        ({"max_steps": "5"}, True),
        ({"max_steps": 7}, False),
        ({"num_train_epochs": 2.0}, True),
        ({"num_train_epochs": 2.1}, False),
        ({}, False),  # three epochs, the host's default
        ({"max_steps": 6, "resume_from_checkpoint": True}, False),
        ({"max_steps": 6, "do_predict": True}, False),
    ],
)
def test_a_run_has_ended_if_none_of_the_steps_that_are_asked_for_are_left(ended, output, asked, expected):
    assert has_ended({"output_dir": str(output), **asked}, ended) is expected


@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json", LOG_FILE, "end"])
def test_a_run_that_was_killed_before_its_end_has_not_ended(ended, output, lost):
    args = {"output_dir": str(output), "max_steps": 6}
    assert has_ended(args, ended)
    assert not has_ended(args, None)
    if lost == "end":
        (output / LOG_FILE).write_text('{"event": "begin"}\n{"event": "en')
    else:
        (output / lost).unlink()
    assert not has_ended(args, ended)
