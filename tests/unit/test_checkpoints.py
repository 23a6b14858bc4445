"""Damaged checkpoints, cache entries and logs; what an older run left behind."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive import files
from llamafactory_adaptive.errors import CalibrationError, PlanError
from llamafactory_adaptive.methods import ScoringContext
from llamafactory_adaptive.methods.sensitivity import Sensitivity, SensitivityOptions
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.training import checkpoint_files, leftovers


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
        ({"deepspeed_stage": 1}, "deepspeed_stage is 2 there and 1 here"),
        ({"round_robin_gradients": False}, "round_robin_gradients is True there and False here"),
        ({"processes": 1}, "processes is 2 there and 1 here"),
        ({"deepspeed_stage": None}, "deepspeed_stage is 2 there and None here"),
    ):
        with pytest.raises(PlanError, match=words):
            checkpoint_files.check_layout(tmp_path, {**there, **change})
    plain = {"deepspeed_stage": None, "round_robin_gradients": False, "processes": 2}
    checkpoint_files.write_layout(tmp_path, plain)
    assert "written by 2 processes" in checkpoint_files.check_layout(tmp_path, {**plain, "processes": 1})


def test_the_layout_of_a_run_is_read_from_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory_adaptive.bridge.resuming import layout

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    expected = {"deepspeed_stage": 2, "round_robin_gradients": True, "processes": 2}
    assert layout({"deepspeed": str(path)}) == expected
    assert layout({}) == {"deepspeed_stage": None, "round_robin_gradients": False, "processes": 2}


def test_half_a_line_is_dropped_on_read_and_by_the_next_append(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, '{"step": 1}')
    with log.open("a") as file:
        file.write('{"step": 2, "ra')
    assert files.read_lines(log) == ['{"step": 1}']
    files.append_line(log, '{"step": 3}')
    assert log.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_damaged_cache_entry_is_told_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = tmp_path / "entry.json"
    assert not files.usable_entry(entry)
    entry.write_text("content")
    files.note_checksum(entry)
    assert files.usable_entry(entry)
    entry.write_text("Content")
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        assert not files.usable_entry(entry)
    assert "entry.json in the cache is damaged" in caplog.text
    assert not entry.exists()
    assert (tmp_path / "entry.json.damaged").read_text() == "Content"
    entry.write_text("without a checksum")
    assert not files.usable_entry(entry)


def test_an_older_run_is_moved_aside_but_for_what_the_settings_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    (out / "checkpoint-4").mkdir()
    for name in ("adaptive_rank_plan.json", "adaptive_samples.jsonl", "trainer_state.json", "notes.txt",
                 "adapter_model.safetensors", "checkpoint-2/adaptive_rank_plan.json", "checkpoint-4/x"):  # fmt: skip
        (out / name).write_text(name)
    (out / "checkpoint-2" / "adaptive_rank_plan.json").unlink()
    assert leftovers.set_older_run_aside(out) is None, "a plan alone is no run"
    (out / "adaptive_log.jsonl").write_text("")
    aside = leftovers.set_older_run_aside(out, [out / "checkpoint-4" / "x"])
    assert aside == out / "_adaptive_previous" / "1"
    assert {path.name for path in aside.iterdir()} == {
        "adaptive_log.jsonl", "adaptive_rank_plan.json", "adaptive_samples.jsonl", "trainer_state.json",
        "checkpoint-2",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "_adaptive_previous", "checkpoint-4", "notes.txt", "adapter_model.safetensors",
    }  # fmt: skip
    (out / "adaptive_log.jsonl").write_text("")
    assert leftovers.set_older_run_aside(out) == out / "_adaptive_previous" / "2"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda value: value * float("nan"), "NaN or infinity for m1"),
        (lambda value: -value, "negative second moments for m1"),
        (torch.zeros_like, "zeros only for m1"),
    ],
)
@pytest.mark.parametrize("allocation", ["sra", "pra"])
def test_statistics_that_are_none_never_become_uniform_ranks(spoil, words, allocation) -> None:
    shapes = tuple(ModuleShape(name, 8, 8) for name in ("m0", "m1", "m2"))
    statistics = {shape.name: torch.rand(8, generator=torch.Generator().manual_seed(i)) + 0.1
                  for i, shape in enumerate(shapes)}  # fmt: skip
    method, context = Sensitivity(SensitivityOptions(allocation=allocation)), ScoringContext(shapes, 4, 0)
    assert len(set(method.score(statistics, context).values.values())) > 1
    with pytest.raises(CalibrationError, match=words):
        method.score({**statistics, "m1": spoil(statistics["m1"])}, context)
