"""One global batch on every engine: one process, DDP, ZeRO-1, 2 and 3 on two processes find the same ranks."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_launch import BIN, EXAMPLES, run
from test_training import train
from tiny import pruning_settings

from llamafactory_adaptive.plan import load_plan


pytestmark = pytest.mark.slow
HARD = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.01}
TWO = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"}


def deepspeed_config(folder: Path, stage: int, **zero) -> Path:
    """An example configuration at another stage."""
    document = json.loads((EXAMPLES / "deepspeed" / f"ds_z{max(stage, 2)}_config.json").read_text())
    document["zero_optimization"] |= {"stage": stage, **zero}
    path = folder / f"z{stage}.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def alone(tiny_llama, data_dir, tmp_path_factory):
    """The reference: one process sees the whole batch. Two micro-batches a step, and clipping at every step."""
    out = tmp_path_factory.mktemp("alone") / "out"
    train(pruning_settings(tiny_llama, data_dir, out, per_device_train_batch_size=4, **HARD))
    return out


@pytest.fixture
def write(tmp_path, tiny_llama, data_dir):
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(pruning_settings(tiny_llama, data_dir, tmp_path / "out", **HARD)))
    return path


def check_same(out, alone):
    assert load_plan(out / "adaptive_rank_plan.json").ranks() == load_plan(alone / "adaptive_rank_plan.json").ranks()
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, alone))
    assert found.keys() == expected.keys()
    assert max(float((found[key] - expected[key]).abs().max()) for key in found) < 1e-5
    histories = [
        [line["ranks"] for line in map(json.loads, (folder / "adaptive_log.jsonl").read_text().splitlines())
         if line["event"] == "allocation"]
        for folder in (out, alone)
    ]  # fmt: skip
    assert histories[0] == histories[1], "the same at every allocation, not only in the end"


def test_ddp_finds_the_same_ranks_as_one_process(write, alone, tmp_path):
    """Started by torchrun itself."""
    import llamafactory.launcher as launcher

    original = Path(launcher.__file__).parent / "launcher.py"
    run(BIN / "torchrun", "--nproc-per-node", "2", "--master-port", "29541", original, write)
    check_same(tmp_path / "out", alone)


@pytest.mark.parametrize(
    ("stage", "zero"),
    [(1, {}), (2, {"round_robin_gradients": True, "offload_optimizer": {"device": "cpu"}})],
    ids=["zero1", "zero2-offload"],
)
def test_zero_1_and_2_find_the_same_ranks_as_one_process(stage, zero, write, alone, tmp_path):
    run(BIN / "llamafactory-cli", "train", write, f"deepspeed={deepspeed_config(tmp_path, stage, **zero)}", **TWO)
    check_same(tmp_path / "out", alone)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_resumes_bitwise_and_finds_the_same_ranks(stage, write, alone, tmp_path):
    """The whole run first; then again from its checkpoint of step 5, alone in another folder."""
    words = [BIN / "llamafactory-cli", "train", write, f"deepspeed={deepspeed_config(tmp_path, stage)}",
             "save_strategy=steps", "save_steps=5", "overwrite_output_dir=false"]  # fmt: skip
    run(*words, **TWO)
    out, again = tmp_path / "out", tmp_path / "again"
    check_same(out, alone)
    shutil.copytree(out / "checkpoint-5", again / "checkpoint-5")
    run(*words, f"output_dir={again}", **TWO)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (again, out))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    lines = [json.loads(line) for line in (again / "adaptive_log.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"]) for line in lines][:2] == [("resumed", 5), ("allocation", 6)]


def test_two_processes_probe_what_one_does(write, tiny_llama, data_dir, tmp_path):
    more = {"igu_importance": "integrated", "igu_probe_interval": 2, "gradient_accumulation_steps": 1}
    alone = tmp_path / "alone"
    train(pruning_settings(tiny_llama, data_dir, alone, per_device_train_batch_size=4, max_grad_norm=0.01, **more))
    run(BIN / "llamafactory-cli", "train", write, *(f"{key}={value}" for key, value in more.items()), **TWO)
    check_same(tmp_path / "out", alone)


def test_4bit_under_zero2_probes_and_prunes(write, tmp_path):
    run(BIN / "llamafactory-cli", "train", write, f"deepspeed={deepspeed_config(tmp_path, 2)}", "bf16=true",
        "quantization_bit=4", "igu_importance=integrated", "igu_probe_interval=2", **TWO)  # fmt: skip
    plan = load_plan(tmp_path / "out" / "adaptive_rank_plan.json")
    assert plan.budget()["left_parameters"] >= 0
    assert len(set(plan.ranks().values())) > 2


def test_plan_says_what_a_dynamic_run_will_do_and_writes_nothing(write, tmp_path):
    done = run(BIN / "llamafactory-adaptive", "plan", write)
    assert "Ranks are found during training (igu, 14 modules): all start at up to rank 8" in done.stdout
    assert "nothing was written" in done.stdout
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["two.yaml"]
