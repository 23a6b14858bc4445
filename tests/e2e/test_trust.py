"""Whole runs over damaged, mixed and foreign state: passed over with a word, refused in one line, never mixed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_adaptive import files, folder_lock
from llamafactory_adaptive.errors import AdaptiveConfigError, OutputError, PlanError
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.tiny import settings
from tests.helpers.training import train


pytestmark = pytest.mark.slow
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "overwrite_output_dir": False,
          "adaptive_method": "random"}  # fmt: skip


@pytest.fixture(scope="module")
def full_run(tiny_llama, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("full_run") / "out"
    train(settings(tiny_llama, data_dir, out, **SAVING))
    return out


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    name, full_run, tiny_llama, data_dir, tmp_path, caplog
):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-6")
    path = out / "checkpoint-4" / name
    if name == "optimizer.pt":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    args = settings(tiny_llama, data_dir, out, **SAVING)
    with pytest.raises(PlanError, match=rf"checkpoint-4 is damaged.*{name}"):
        train({**args, "resume_from_checkpoint": str(out / "checkpoint-4")})
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        train(args)
    assert f"{name}" in caplog.text
    assert "resuming from checkpoint-2" in caplog.text
    tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, full_run))
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_a_run_on_another_models_plan_resumes_with_its_own_command(full_run, tiny_llama, data_dir, tmp_path):
    link = tmp_path / "another_name"
    link.symlink_to(tiny_llama)
    plan = tmp_path / "plan.json"
    shutil.copy(full_run / files.PLAN_FILE, plan)
    out = tmp_path / "out"
    args = settings(link, data_dir, out, **SAVING, adaptive_plan=str(plan))
    with pytest.raises(KeyboardInterrupt):
        train(args, crash_at=3)
    facts = load_plan(out / files.PLAN_FILE).provenance
    assert facts["base_model"] == str(link)
    assert facts["planned_for"]["base_model"] == str(tiny_llama)
    train(args)
    tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, full_run))
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_a_fresh_run_moves_the_older_one_aside_and_a_second_one_is_refused(full_run, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    args = settings(tiny_llama, data_dir, out, adaptive_method="uniform", max_steps=1)
    with folder_lock.locked(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_lock.locked.__wrapped__, "__defaults__", (0.0,))
        with pytest.raises(OutputError, match="another run works in"):
            train(args)
    train(args)
    assert len((out / files.LOG_FILE).read_text().splitlines()) == 2, "begin and end"
    assert not list(out.glob("checkpoint-[246]"))
    aside = out / files.PREVIOUS_FOLDER / "1"
    assert load_plan(aside / files.PLAN_FILE).method == "random"
    assert (aside / "checkpoint-6" / "optimizer.pt").is_file()


@pytest.mark.repeats  # without a model: tests/unit/planning/test_cache.py
def test_a_damaged_plan_or_statistics_in_the_cache_are_made_anew(tiny_llama, data_dir, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "cache"
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(cache))
    train(settings(tiny_llama, data_dir, tmp_path / "a", max_steps=1))
    ranks = load_plan(tmp_path / "a" / files.PLAN_FILE).ranks()
    for pattern in ("plans/*.json", "statistics/*.safetensors"):
        (path,) = cache.glob(pattern)
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        train(settings(tiny_llama, data_dir, tmp_path / "b", max_steps=1))
    assert caplog.text.count("in the cache is damaged") == 2
    assert load_plan(tmp_path / "b" / files.PLAN_FILE).ranks() == ranks


def test_a_plain_run_over_live_ranks_is_told(full_run, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(full_run, out)
    (out / "checkpoint-6" / files.STATE_JSON).write_text("{}")
    args = settings(tiny_llama, data_dir, out, finetuning_type="lora", overwrite_output_dir=False)
    plain = {key: value for key, value in args.items() if not key.startswith("adaptive_")}
    with pytest.raises(AdaptiveConfigError, match=r"checkpoint-6 is of a run that trains no plain LoRA"):
        train(plain)


def test_checkpoints_of_older_versions_on_a_given_plan_still_resume(full_run, tiny_llama, data_dir, tmp_path, caplog):
    """They noted the model that the plan was made for, and neither digests nor layout."""
    out, plan = tmp_path / "out", tmp_path / "plan.json"
    shutil.copytree(full_run, out)
    (out / "adapter_model.safetensors").unlink()
    shutil.copy(full_run / files.PLAN_FILE, plan)
    for folder in out.glob("checkpoint-*"):
        (folder / files.DIGESTS_FILE).unlink()
        (folder / "adaptive_layout.json").unlink()
        document = json.loads((folder / files.PLAN_FILE).read_text())
        document["provenance"] |= {"adaptive_plan": str(plan), "base_model": "/elsewhere/other"}
        (folder / files.PLAN_FILE).write_text(json.dumps(document))
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        train(settings(tiny_llama, data_dir, out, **{**SAVING, "max_steps": 7}, adaptive_plan=str(plan)))
    assert "has no digests" in caplog.text
    assert "was written by an older version" in caplog.text
