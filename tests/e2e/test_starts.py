"""Runs whose factors start from data: on mixed ranks, resumed, on a 4-bit base, on two processes."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file

from llamafactory_adaptive.adapter.starting_factors import StartingFactors, compressed_gradient
from llamafactory_adaptive.bridge import measure_process
from llamafactory_adaptive.bridge.scoring_job import ScoringJob
from llamafactory_adaptive.planning.cache import CACHE_ENV, cache_folder
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.commands import EXAMPLES
from tests.helpers.fsdp import FSDP1, FSDP2
from tests.helpers.tiny import settings
from tests.helpers.training import adapters_equal, train
from tests.helpers.workers import train_on_two


pytestmark = pytest.mark.slow


@pytest.fixture
def measured_here(monkeypatch, tmp_path):
    """Measure in this process, which has imported everything: only how long a run takes differs."""

    def run_job(job, devices):
        measure_process.run_measurement_job(ScoringJob.from_json(json.loads(json.dumps(job.to_json()))))
        PartialState._reset_state()

    monkeypatch.setattr(measure_process, "run_job", run_job)
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))


def started(model: Path, data: Path, out: Path, **more):
    """A run on random ranks, mixed, whose factors start from data."""
    return settings(model, data, out, adaptive_method="random", adaptive_calibration_batch_size=8, lora_rank=2, **more)


def check_start(out: Path, init: str) -> None:
    """A run at rate zero has saved the start itself, as plain LoRA by the plan (the run has checked the rest)."""
    plan, tensors = load_plan(out / "adaptive_rank_plan.json"), load_file(out / "adapter_model.safetensors")
    [path] = (cache_folder() / "starts").glob("*.safetensors")
    rows = load_file(path)
    assert len(set(plan.ranks().values())) > 1
    assert plan.provenance["init"]["adaptive_init"] == init
    for module in plan.active:
        a, b = (tensors[f"base_model.model.{module.name}.lora_{factor}.weight"] for factor in "AB")
        own = rows[module.name][: module.rank]
        expected = torch.zeros_like(b)
        if init == "gora":
            expected = compressed_gradient(own, module.in_features, plan.scale, 0.05).float()
        assert torch.equal(a, own[:, : module.in_features])
        assert torch.equal(b, expected)
        assert bool(b.any()) == (init == "gora")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True, "nothing that a reader would compute again"


@pytest.mark.parametrize("init", ["eva", "gora"])
def test_a_fresh_adapter_holds_the_first_rows_of_each_module(init, measured_here, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    train(started(tiny_llama, data_dir, out, adaptive_init=init, learning_rate=0.0, max_steps=1))
    check_start(out, init)


@pytest.mark.repeats
def test_a_4_bit_base_has_such_a_start(measured_here, tiny_llama, data_dir, tmp_path):
    out, four = tmp_path / "out", {"quantization_bit": 4, "bf16": True}
    train(started(tiny_llama, data_dir, out, adaptive_init="eva", learning_rate=0.0, max_steps=1, **four))
    check_start(out, "eva")


def test_a_resumed_run_does_not_start_again(measured_here, tiny_llama, data_dir, tmp_path, monkeypatch):
    copied, original = [], StartingFactors.copy_into
    monkeypatch.setattr(StartingFactors, "copy_into", lambda *args: copied.append(1) or original(*args))
    more = {"adaptive_init": "gora", "max_steps": 2, "save_strategy": "steps", "save_steps": 1,
            "overwrite_output_dir": False}  # fmt: skip
    train(started(tiny_llama, data_dir, tmp_path / "whole", **more))
    with pytest.raises(KeyboardInterrupt):
        train(started(tiny_llama, data_dir, tmp_path / "cut", **more), crash_at=2)
    assert len(copied) == 2
    train(started(tiny_llama, data_dir, tmp_path / "cut", **more))
    assert len(copied) == 2
    assert adapters_equal(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.repeats
@pytest.mark.parametrize(
    ("engine", "init"),
    [("ddp", "eva"), ("zero2", "eva"), ("fsdp2", "eva"), ("fsdp2", "gora"), ("fsdp1", "eva"), ("fsdp1", "gora")],
)
def test_two_processes_start_from_the_same_factors(engine, init, measured_here, tiny_llama, data_dir, tmp_path):
    alone, out = tmp_path / "alone", tmp_path / "out"
    more = {"adaptive_init": init, "learning_rate": 0.0, "max_steps": 1}
    train(started(tiny_llama, data_dir, alone, **more))  # which leaves in the cache what both processes then read
    deepspeed = {"deepspeed": str(EXAMPLES / "deepspeed" / "ds_z2_config.json")} if engine == "zero2" else {}
    environment = {"fsdp2": FSDP2, "fsdp1": FSDP1}.get(engine, {})
    train_on_two(started(tiny_llama, data_dir, out, **more, **deepspeed), tmp_path / "logs", **environment)
    check_start(out, init)
    assert adapters_equal(alone, out)
