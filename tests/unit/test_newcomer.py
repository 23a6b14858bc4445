"""What a person reads before and after a run: warnings of short runs, closing words, one run's report."""

import json

import pytest
from tiny import settings, write_datasets

from llamafactory_adaptive.bridge.target_shapes import _refuse_conv1d, _tell_of_fused_experts, _told, estimated_steps
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.ranks.schedule import Refreshes, Schedule, short_run_warning
from llamafactory_adaptive.reports.run_report import Run, run_text
from llamafactory_adaptive.reports.tables import closing_words


def plan():
    modules = tuple(
        ModulePlan(f"model.layers.{layer}.mlp.{kind}", 8, 16, rank=rank)
        for layer, kind, rank in ((0, "up_proj", 2), (0, "down_proj", 6), (1, "up_proj", 4), (1, "down_proj", 0))
    )
    return RankPlan("igu", {}, "params", 4, 8.0, modules)


@pytest.mark.parametrize(
    ("schedule", "total", "said"),
    [
        (Schedule(0, 1, 10, 100, 50), 1, "chosen only once between steps 0 and 1 of 1"),
        (Schedule(10, 70, 100, 100, 50), 100, "adaptive_interval: 6"),
        (Schedule(10, 70, 20, 100, 50), 100, "chosen only 4 times between steps 10 and 70 of 100"),
        (Refreshes(5, 5, 100), 9, "chosen only once"),
    ],
)
def test_runs_too_short_for_their_schedule_are_warned_of(schedule, total, said):
    assert said in short_run_warning(schedule, total)
    assert "max_steps" in short_run_warning(schedule, total)


def test_a_schedule_with_room_is_not():
    assert short_run_warning(Schedule(10, 70, 10, 100, 50), 100) is None
    assert short_run_warning(Refreshes(25, 75, 100), 100) is None


def test_closing_words_name_ranks_cost_files_and_what_follows(tmp_path):
    for name in ("adaptive_rank_plan.json", "adaptive_ranks.png"):
        (tmp_path / name).write_text("")
    said = closing_words(plan(), tmp_path, 5.0, 20.0, ["mind this"])
    assert "Adaptive ranks (igu), 3 of 4 modules" in said
    assert [line.split()[:4] for line in said.splitlines() if "_proj" in line] == [
        ["up_proj", "2", "3.0", "2-4"], ["down_proj", "2", "3.0", "0-6"]]  # fmt: skip
    assert "finding ranks took 5.0 of 20.0 s (25.0%)" in said
    assert f"in {tmp_path}: adaptive_rank_plan.json, adaptive_ranks.png" in said
    assert "warning: mind this" in said
    assert f"llamafactory-adaptive report {tmp_path}" in said


def test_the_report_of_one_run_has_its_losses(tmp_path):
    run = Run(tmp_path, plan(), 30, 1.5, 1.25, 60.0, 3.0, losses=(3.0, 0.5, 1.0), eval_losses=(1.2, 1.25))
    said = run_text(run)
    assert "first 3.0000, last 1.0000, lowest 0.5000, mean 1.5000" in said
    assert "evaluation loss       last 1.2500, lowest 1.2000" in said
    assert "60.0, finding ranks and scoring samples 3.0 (5.0% of it)" in said


def test_steps_are_estimated_from_rows_epochs_and_batches(tmp_path, monkeypatch):
    data = write_datasets(tmp_path / "data")  # 24 rows
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
    args = settings(tmp_path, data, tmp_path / "out", max_steps=-1, num_train_epochs=3.0)
    assert estimated_steps({**args, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}) == 9
    assert estimated_steps({**args, "val_size": 4, "per_device_train_batch_size": 3}) == 21
    assert estimated_steps({**args, "max_samples": 10, "per_device_train_batch_size": 5, "num_train_epochs": 0.5}) == 1
    (data / "lines.jsonl").write_text('{"a": 1}\n' * 8)
    info = json.loads((data / "dataset_info.json").read_text()) | {"lines": {"file_name": "lines.jsonl"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    assert estimated_steps({**args, "dataset": "tiny_sft,lines", "per_device_train_batch_size": 32}) == 3
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert estimated_steps({**args, "per_device_train_batch_size": 2}) == 18
    for unknown in ({"dataset": "tiny_lost"}, {"dataset": "tiny_test_split"}, {"streaming": True}, {"packing": True}):
        assert estimated_steps({**args, **unknown}) is None


def test_layers_that_cannot_be_adapted_are_named(caplog):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 1}
    with torch.device("meta"):
        small = GPT2LMHeadModel(GPT2Config(**sizes))
        experts = MixtralForCausalLM(MixtralConfig(
            vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
            num_key_value_heads=1, num_local_experts=4))  # fmt: skip
    with pytest.raises(AdaptiveConfigError, match=r"'GPT2LMHeadModel' is invalid: .*of type Conv1D"):
        _refuse_conv1d(small)
    _refuse_conv1d(experts)
    _told.clear()
    _tell_of_fused_experts(experts)
    _tell_of_fused_experts(experts)
    told = [record.getMessage() for record in caplog.records if "experts" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("4 weights hold the experts of a layer in one tensor")
