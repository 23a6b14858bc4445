"""Damaged checkpoints are told of by name, and those of another layout by key."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive import files
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.training import checkpoint_files


FILES = ("adapter_config.json", "adapter_model.safetensors", "adaptive_rank_plan.json", "trainer_state.json",
         "optimizer.pt", "scheduler.pt", "rng_state.pth", "adaptive_state.json",
         "adaptive_state.safetensors")  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a run that finds its ranks, whole, without digests."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    for name in FILES:
        path = folder / name
        if path.suffix == ".safetensors":
            save_file({"w": torch.arange(100.0)}, path)
        elif path.suffix == ".json":
            path.write_text(json.dumps({"provenance": {"course": {}}, "partitioned": False, "loss": float("nan")}))
        else:
            with zipfile.ZipFile(path, "w") as file:
                file.writestr("data", os.urandom(500))
    (folder / "adaptive_rank_plan.json").write_text(json.dumps({"provenance": {"course": {}}}))
    (folder / "adaptive_state.json").write_text(json.dumps({"partitioned": False}))
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_truncated_file_is_named_with_and_without_digests(checkpoint: Path, name: str) -> None:
    assert checkpoint_files.damage(checkpoint) == ""
    content = (checkpoint / name).read_bytes()
    for sealed in (False, True):
        if sealed:
            files.write_digests(checkpoint)
        (checkpoint / name).unlink()
        # A scheduler or random state tells of an optimizer; alone, only digests know that it was there.
        if sealed or name not in ("scheduler.pt", "rng_state.pth"):
            assert f"{name} is missing" in checkpoint_files.damage(checkpoint)
        (checkpoint / name).write_bytes(content[: len(content) // 2])
        assert name in checkpoint_files.damage(checkpoint)
        (checkpoint / name).write_bytes(content)
        assert checkpoint_files.damage(checkpoint) == ""


@pytest.mark.parametrize(
    ("facts", "has_state"),
    [
        ({"course": {}}, True),
        ({"course": {}, "adaptive_plan": "p.json"}, False),  # of the search that found the given ranks
        ({"course": {}, "adaptive_plan": "p.json", "second_stage": {"igu_init": "lora"}}, True),
        ({"adaptive_plan": "p.json"}, False),
    ],
)
def test_the_state_is_missed_only_where_the_run_had_one(checkpoint: Path, facts: dict, has_state: bool) -> None:
    (checkpoint / "adaptive_rank_plan.json").write_text(json.dumps({"provenance": facts}))
    for name in ("adaptive_state.json", "adaptive_state.safetensors"):
        (checkpoint / name).unlink()
    assert ("adaptive_state.json is missing" in checkpoint_files.damage(checkpoint)) == has_state


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_of_a_sealed_checkpoint_is_found(checkpoint: Path, name: str) -> None:
    files.write_digests(checkpoint)
    content = bytearray((checkpoint / name).read_bytes())
    content[-2] ^= 1
    (checkpoint / name).write_bytes(content)
    assert checkpoint_files.damage(checkpoint) == f"{name} has changed since it was written"
    checkpoint_files.unseal(checkpoint)
    assert not checkpoint_files.is_sealed(checkpoint)
    assert "is missing" in checkpoint_files.damage(checkpoint), "what is being written over does not count"


def test_damaged_digests_are_damage(checkpoint: Path) -> None:
    (checkpoint / files.DIGESTS_FILE).write_text("{")
    assert "not valid JSON" in checkpoint_files.damage(checkpoint)


def test_another_layout_is_refused_by_key_and_value(tmp_path: Path) -> None:
    there = {"deepspeed_stage": 2, "round_robin_gradients": True, "processes": 2}
    assert checkpoint_files.check_layout(tmp_path, there) == "", "older versions noted none"
    checkpoint_files.write_layout(tmp_path, there)
    assert checkpoint_files.check_layout(tmp_path, there) == ""
    for change, words in (
        (
            {"deepspeed_stage": 1},
            "deepspeed_stage is 2 there and 1 here; DeepSpeed reads its optimizer state only und",
        ),
        ({"round_robin_gradients": False}, "round_robin_gradients is True there and False here; DeepSpeed reads"),
        ({"processes": 1}, "processes is 2 there and 1 here; DeepSpeed reads its optimizer state only under the ZeRO"),
        ({"deepspeed_stage": None}, "deepspeed_stage is 2 there and None here; without DeepSpeed the Trainer cannot"),
    ):
        with pytest.raises(PlanError, match=words):
            checkpoint_files.check_layout(tmp_path, {**there, **change})
    plain = {"deepspeed_stage": None, "round_robin_gradients": False, "processes": 2}
    checkpoint_files.write_layout(tmp_path, plain)
    with pytest.raises(PlanError, match="stage is None there and 3 here; DeepSpeed cannot read the optimizer state"):
        checkpoint_files.check_layout(tmp_path, {**plain, "deepspeed_stage": 3})
    assert checkpoint_files.check_layout(tmp_path, {**plain, "fsdp_version": 2}) == "", "older versions noted none"
    checkpoint_files.write_layout(tmp_path, {**plain, "fsdp_version": 2})
    assert checkpoint_files.check_layout(tmp_path, {**plain, "fsdp_version": 2}) == ""
    with pytest.raises(
        PlanError, match="fsdp_version is 2 there and 0 here; the Trainer reads the optimizer state of"
    ):
        checkpoint_files.check_layout(tmp_path, {**plain, "fsdp_version": 0})
    with pytest.raises(PlanError, match="processes is 2 there and 4 here; the Trainer cannot load a check"):
        checkpoint_files.check_layout(tmp_path, {**plain, "fsdp_version": 2, "processes": 4})


def test_without_deepspeed_any_number_of_processes_goes_on_and_is_told_of_the_global_batch(tmp_path: Path) -> None:
    def advice(**change: int) -> str:
        plain = {"deepspeed_stage": None, "round_robin_gradients": False, "processes": 2}
        return checkpoint_files.check_layout(tmp_path, {**plain, **change})

    written = {"deepspeed_stage": None, "round_robin_gradients": False, "processes": 2}
    checkpoint_files.write_layout(tmp_path, written)
    assert advice(global_batch=8) == "", "an earlier version recorded no batch"
    assert advice(processes=1, global_batch=8).endswith("weights up to rounding, if the global batch is the same")
    checkpoint_files.write_layout(tmp_path, {**written, "global_batch": 8})
    assert advice(global_batch=8) == ""
    assert advice(processes=1, global_batch=8) == (
        f"{tmp_path.name} was written by 2 processes and goes on with 1: ranks stay the same, and weights up to "
        "rounding, as the global batch is still 8"
    )
    for processes in (1, 2):
        assert "take 8 rows a step" in advice(processes=processes, global_batch=4)
