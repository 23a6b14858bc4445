"""Interrupted and killed runs that prune resume as if they had not been, and on no other run's checkpoints."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.training.checkpoint_files import damage
from tests.helpers.tiny import pruning_settings, save_tiny
from tests.helpers.training import adapters_equal, lines, train


pytestmark = pytest.mark.slow
SAVING = {"save_strategy": "steps", "save_steps": 3, "overwrite_output_dir": False, "lora_dropout": 0.1}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({}, id="igu"),
        pytest.param({"adaptive_method": "adalora"}, id="adalora"),
        pytest.param({"igu_importance": "integrated"}, id="integrated"),
        pytest.param(
            {"adaptive_method": "adalora", "adalora_statistics_dtype": "bfloat16"},
            id="bf16",
            marks=pytest.mark.repeats,
        ),
        pytest.param(
            {"adaptive_method": "elalora", "elalora_exchanged_ranks": 4}, id="elalora", marks=pytest.mark.repeats
        ),
        pytest.param({"adaptive_method": "svd", "adaptive_interval": None}, id="svd", marks=pytest.mark.repeats),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(more, tiny_llama, data_dir, tmp_path):
    """Crash after step 7, between the checkpoint of step 6 and the final allocation: bitwise the same in the end."""
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    train(pruning_settings(tiny_llama, data_dir, uninterrupted, **SAVING, **more))
    with pytest.raises(KeyboardInterrupt):
        train(pruning_settings(tiny_llama, data_dir, interrupted, **SAVING, **more), crash_at=7)
    train(pruning_settings(tiny_llama, data_dir, interrupted, **SAVING, **more))
    assert adapters_equal(uninterrupted, interrupted)
    for name in ("checkpoint-9", "checkpoint-12"):
        states = [load_file(folder / name / "adaptive_state.safetensors") for folder in (uninterrupted, interrupted)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        documents = [
            json.loads((folder / name / "adaptive_state.json").read_text()) for folder in (uninterrupted, interrupted)
        ]
        assert documents[0]["masks"] == documents[1]["masks"]
        assert documents[0]["history"] == documents[1]["history"]
        assert documents[0]["counters"] == documents[1]["counters"]
    assert [line["event"] for line in lines(interrupted)].count("resumed") == 1
    assert (interrupted / "adaptive_rank_history.png").is_file()


def test_killed_and_resumed_equals_never_killed(tiny_llama, data_dir, tmp_path):
    """kill -9 while it runs; then a checkpoint that was being written is left over, and is not resumed from."""
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    more = {**SAVING, "max_steps": 400, "save_steps": 20, "adaptive_interval": 10, "save_total_limit": 1}
    path = tmp_path / "interrupted.yaml"
    path.write_text(yaml.safe_dump(pruning_settings(tiny_llama, data_dir, interrupted, **more)))
    program = "from llamafactory_adaptive.cli import main; import sys; main(['train', sys.argv[1]])"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 400  # a bound for what hangs, not a time to keep
    while not (interrupted / "checkpoint-40" / "trainer_state.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folders = sorted(interrupted.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    complete = [folder for folder in folders if not damage(folder)]
    assert not (interrupted / "adapter_model.safetensors").exists()
    half = interrupted / f"checkpoint-{int(folders[-1].name.rpartition('-')[2]) + 20}"
    shutil.copytree(complete[-1], half)
    (half / "trainer_state.json").unlink()
    (half / "optimizer.pt").unlink()
    train(pruning_settings(tiny_llama, data_dir, interrupted, **more))
    resumed = next(line for line in lines(interrupted) if line["event"] == "resumed")
    assert f"checkpoint-{resumed['step']}" == complete[-1].name
    train(pruning_settings(tiny_llama, data_dir, uninterrupted, **more))
    assert adapters_equal(uninterrupted, interrupted)


def test_killed_in_its_first_save_starts_afresh(tiny_llama, data_dir, tmp_path):
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    train(pruning_settings(tiny_llama, data_dir, uninterrupted, **SAVING))
    with pytest.raises(KeyboardInterrupt):
        train(pruning_settings(tiny_llama, data_dir, interrupted, **SAVING), crash_at=4)
    (interrupted / "checkpoint-3" / "adaptive_rank_plan.json").unlink()
    train(pruning_settings(tiny_llama, data_dir, interrupted, **SAVING))
    assert adapters_equal(uninterrupted, interrupted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 3}, "lora_rank is 4 there and 3 here"),
        ({"adaptive_method": "adalora"}, "adaptive_method is igu there and adalora here"),
        ({"igu_beta1": 0.9}, "igu_beta1 is 0.999 there and 0.9 here"),
        ({"adaptive_interval": 3}, "adaptive_interval is 2 there and 3 here"),
        ({"model": {}}, "model_name_or_path is .* there and .*other here"),
        ({"model": {"intermediate_size": 48}, "name": "same"}, "is 32x64 in the plan, 32x48 in the model"),
        ({"max_steps": 15}, "belongs to a run of 12 steps and this one has 15"),
        ({"damaged": "adaptive_state.safetensors"}, "adaptive_state.safetensors has changed since it was written"),
        ({"damaged": "adaptive_state.json"}, "adaptive_state.json has changed since it was written"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(change, message, one_crashed_run, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(one_crashed_run, out)
    change = dict(change)
    base = tiny_llama
    if "model" in change:
        name = tiny_llama.name if change.pop("name", "") == "same" else "other"
        base = save_tiny(tmp_path / name, **change.pop("model"))
    if "damaged" in change:
        (out / "checkpoint-3" / change.pop("damaged")).write_bytes(b"{")
        change["resume_from_checkpoint"] = str(out / "checkpoint-3")
    with pytest.raises(PlanError, match=message):
        train(pruning_settings(base, data_dir, out, **{**SAVING, **change}))
    assert not (out / "adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def one_crashed_run(tiny_llama, data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("crashed") / "out"
    with pytest.raises(KeyboardInterrupt):
        train(pruning_settings(tiny_llama, data_dir, out, **SAVING), crash_at=4)
    return out
