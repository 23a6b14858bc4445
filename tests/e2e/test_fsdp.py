"""Ranks that are fixed before training, under FSDP on two processes: trained, saved whole, gone on with."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.fsdp import FSDP1, FSDP2
from tests.helpers.tiny import pruning_settings, unmeasured_settings
from tests.helpers.workers import train_on_two


pytestmark = pytest.mark.slow
WITHOUT_LOADING_ALONE = {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def check_went_on(out, again, checkpoint):
    """The run in ``again`` did not write its copy of a checkpoint anew, and ended as the unbroken run did."""
    copied, original = (folder / checkpoint / "adapter_model.safetensors" for folder in (again, out))
    assert copied.stat().st_mtime_ns == original.stat().st_mtime_ns
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(out).items())


@pytest.mark.parametrize("best", [False, pytest.param(True, marks=pytest.mark.repeats)], ids=["resumed", "best"])
def test_what_the_trainer_loads_under_fsdp2_is_the_whole_adapter(best, tiny_llama, data_dir, tmp_path):
    """Its own checkpoint holds the rows of the first process alone, which every process would go on with."""
    more = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "overwrite_output_dir": False}
    if best:
        more |= {"load_best_model_at_end": True, "eval_dataset": "tiny_eval", "eval_strategy": "steps",
                 "eval_steps": 1, "metric_for_best_model": "eval_loss", "greater_is_better": True}  # fmt: skip
    out, again = tmp_path / "out", tmp_path / "again"
    train_on_two(unmeasured_settings(tiny_llama, data_dir, out, **more), tmp_path / "logs", **FSDP2)
    if best:  # the worst by its loss, so that it is not the last
        assert any(
            all(
                torch.equal(tensor, weights(out / f"checkpoint-{step}")[name]) for name, tensor in weights(out).items()
            )
            for step in (1, 2)
        )
        return
    assert all(bool(tensor.any()) for name, tensor in weights(out).items() if "lora_B" in name)
    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    train_on_two(unmeasured_settings(tiny_llama, data_dir, again, **more), tmp_path / "logs", **FSDP2)
    check_went_on(out, again, "checkpoint-2")


@pytest.mark.repeats
@pytest.mark.parametrize("bits", [None, 4])
def test_bf16_and_4bit_bases_are_searched_under_fsdp2(bits, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    more = {"bf16": True, "quantization_bit": bits} if bits else {"bf16": True}
    train_on_two(pruning_settings(tiny_llama, data_dir, out, **more), tmp_path / "logs", **WITHOUT_LOADING_ALONE)
    plan = load_plan(out / "adaptive_rank_plan.json")
    assert len(set(plan.ranks().values())) > 1
    assert all(bool(tensor.isfinite().all()) for tensor in weights(out).values())


@pytest.mark.repeats
def test_fsdp1_trains_fixed_ranks_saves_them_whole_and_goes_on(tiny_llama, data_dir, tmp_path):
    out, again, alone = tmp_path / "out", tmp_path / "again", tmp_path / "alone"
    more = {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    train_on_two(unmeasured_settings(tiny_llama, data_dir, out, **more), tmp_path / "logs", **FSDP1)
    train_on_two(unmeasured_settings(tiny_llama, data_dir, alone, **more), tmp_path / "logs")
    assert max(float((tensor - weights(alone)[name]).abs().max()) for name, tensor in weights(out).items()) < 1e-4
    shutil.copytree(out / "checkpoint-1", again / "checkpoint-1")
    train_on_two(unmeasured_settings(tiny_llama, data_dir, again, **more), tmp_path / "logs", **FSDP1)
    check_went_on(out, again, "checkpoint-1")


@pytest.mark.repeats
def test_fsdp1_trains_a_4bit_base(tiny_llama, data_dir, tmp_path):
    """Its flat tensors take one type, so that what is not quantised must be in that of the quantised storage."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    out, alone = tmp_path / "out", tmp_path / "alone"
    more = {"bf16": True, "quantization_bit": 4, "max_steps": 4}
    train_on_two(unmeasured_settings(base, data_dir, out, **more), tmp_path / "logs", **FSDP1)
    train_on_two(unmeasured_settings(base, data_dir, alone, **more), tmp_path / "logs")
    moved = [
        torch.cat([tensor.flatten() for name, tensor in weights(folder).items() if "lora_B" in name])
        for folder in (out, alone)
    ]
    assert torch.cosine_similarity(*moved, dim=0) > 0.99, "but for rounding in bf16"
