"""TsqLoRA through LLaMA-Factory's own entry: samples chosen, ranks moved, alone and together, refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.reports.data_report import DATA_PLOT_FILE, DATA_REPORT_FILE, SAMPLES_FILE, read_data_report
from tests.helpers.tiny import tsq_settings
from tests.helpers.training import (
    EVALUATE,
    allocations,
    batches_seen,
    lines,
    logits,
    peft_logits,
    samples,
    train,
)


pytestmark = pytest.mark.slow


def test_samples_and_ranks_together(tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    keep = train(tsq_settings(tiny_llama, data_dir, out, save_strategy="steps", save_steps=5))
    plan, events = load_plan(out / "adaptive_rank_plan.json"), allocations(out)
    live = logits(keep.model)
    assert (peft_logits(tiny_llama, out) - live).abs().max() <= 1e-4
    tensors = load_file(out / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == plan.budget()["used_parameters"]

    assert [line["step"] for line in events] == [3, 6, 9]
    cheapest = min(m.parameters_per_rank for m in plan.modules)
    for line in events:
        assert line["budget_asked"] == 4096
        assert 0 <= line["budget_asked"] - line["budget_used"] < cheapest
        assert line["subset_size"] == round(0.7 * 24)
        assert line["effective_sample_size"] > 1
    assert [line["subset"] for line in lines(out)] == [0, 1, 2, 3]
    assert all(any(line[key] for line in events) for key in ("grown", "shrunk"))
    assert events[-1]["final"]
    assert events[-1]["ranks"] == list(plan.ranks().values())
    assert set(events[-1]["memory"]) == {"scoring_samples", "observing", "allocating"}
    assert 2**20 < events[-1]["memory"]["scoring_samples"]["host"] <= events[-1]["peak_memory"]["host"]
    assert events[-1]["plan_origin"] == "started"

    checkpoint = json.loads((out / "checkpoint-5" / "adapter_config.json").read_text())
    assert checkpoint["r"] == 16, "live shapes stay at adaptive_max_rank"
    used, report = samples(out), read_data_report(out)
    assert sum(sample["used"] for sample in used) == 12 * 2, "17 samples a subset, 18 an epoch: whole batches"
    assert report["samples_used"] == sum(sample["used"] > 0 for sample in used)
    assert (out / DATA_PLOT_FILE).stat().st_size > 5000
    assert [sample["index"] for sample in report["best"]] == [
        sample["index"] for sample in sorted(used, key=lambda s: -s["quality"])[:10]
    ]
    assert all(sample["prompt"].startswith("Human:") and sample["answer"] for sample in report["worst"])


def test_what_is_drawn_is_what_trains(tiny_llama, data_dir, tmp_path, monkeypatch):
    """Token rows that reach the model against the report's counts; samples alone, ranks stay uniform."""
    seen, out = batches_seen(monkeypatch), tmp_path / "out"
    args = tsq_settings(tiny_llama, data_dir, out, tsq_reallocation=False, gradient_accumulation_steps=2)
    keep = train(args)
    assert set(load_plan(out / "adaptive_rank_plan.json").ranks().values()) == {4}
    assert (peft_logits(tiny_llama, out) - logits(keep.model)).abs().max() <= 1e-4
    assert [line.get("event") for line in lines(out)] == [None, "sampling", "sampling", "sampling"]
    counts: dict[tuple, int] = {}
    for batch in seen:
        for row in batch:
            key = tuple(token for token in row if token != 258)
            counts[key] = counts.get(key, 0) + 1
    assert sorted(counts.values()) == sorted(sample["used"] for sample in samples(out) if sample["used"])


def test_ranks_alone_see_all_samples(tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    train(tsq_settings(tiny_llama, data_dir, out, tsq_sampling=False, tsq_sensitivity="fisher"))
    assert not (out / DATA_REPORT_FILE).exists()
    assert "subset_size" not in allocations(out)[0]
    assert len(set(load_plan(out / "adaptive_rank_plan.json").ranks().values())) > 2


CASES = {
    "exact_terms": {"tsq_alignment_weight": 1.0, "tsq_projection": 0, "tsq_loss_drop": "exact", "tsq_batch_size": 5},
    "projected": {"tsq_alignment_weight": 0.5, "lora_dropout": 0.1, "adaptive_budget_unit": "ranks"},
    "quality_budget": {"tsq_phi": "quality"},
    "4bit": {"quantization_bit": 4, "bf16": True},
    "no_checkpointing": {"disable_gradient_checkpointing": True, "bf16": True},
    "non_reentrant": {"use_reentrant_gc": False},
    "pt": {"stage": "pt", "dataset": "tiny_raw"},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.0, "gradient_accumulation_steps": 3},
    "clipped": {"tsq_clip_quantile": 0.75, "tsq_subset_ratio": 1.0, "dataloader_num_workers": 1},
    "one_step": {"max_steps": 1},
    "rescored": {
        "tsq_refresh_quality": True,
        "tsq_draws": "quality",
        "tsq_min_cluster_share": 0.5,
        "tsq_clusters": 3,
        "dataloader_num_workers": 1,
        "gradient_accumulation_steps": 2,
    },
    "packed_but_not_sampled": {"packing": True, "tsq_sampling": False},
    "dpo_but_not_sampled": {"stage": "dpo", "dataset": "tiny_pairs", "pref_beta": 0.1, "tsq_sampling": False},
    "8bit_optimizer": {"optim": "adamw_bnb_8bit"},
    "loraplus": {"loraplus_lr_ratio": 4.0, "additional_target": "embed_tokens"},
}


@pytest.mark.parametrize("case", list(CASES))
def test_options_and_stages(case, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    train(tsq_settings(tiny_llama, data_dir, out, **CASES[case]))
    plan, events = load_plan(out / "adaptive_rank_plan.json"), allocations(out)
    assert events
    assert all(
        line["budget_used"] <= line["budget_asked"] <= plan.budget()["asked_" + plan.budget_kind] for line in events
    )
    if case == "quality_budget":
        assert all(0.5 * 4096 <= line["budget_asked"] < 4096 for line in events)
    if case == "projected":
        assert plan.budget()["left_ranks"] == 0
    if case == "clipped":
        left_out = sorted(samples(out), key=lambda sample: -sample["loss"])[:6]
        assert [s["index"] for s in samples(out) if s["clipped"]] == sorted(s["index"] for s in left_out)
        assert not any(sample["used"] for sample in samples(out) if sample["clipped"])
    if case == "rescored":
        scorings = [line for line in lines(out) if line["event"] == "scoring"]
        assert [(line["step"], line["subset"]) for line in scorings] == [(1, 1), (4, 2), (7, 3)], "two steps ahead"
        assert read_data_report(out)["scorings"] == 4
        assert all(len(line["cluster_draw_shares"]) == len(read_data_report(out)["clusters"]) for line in events)
    if case == "epochs":
        assert events[-1]["counters"]["steps"] == events[-1]["step"]
        # 17 samples a subset, 18 an epoch; batches of 2, 3 of them a step
        assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2 * 3


def test_scores_are_cached_and_weights_need_no_second_pass(tiny_llama, data_dir, tmp_path, monkeypatch):
    from llamafactory_adaptive.training import sample_scoring

    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path / "cache"))
    calls, original = [], sample_scoring.measure
    monkeypatch.setattr(sample_scoring, "measure", lambda *a, **k: calls.append(1) or original(*a, **k))
    for number, more in enumerate(({}, {"tsq_temperature": 9.0, "tsq_clip_quantile": 0.9, "tsq_norm_weight": 2.0})):
        train(tsq_settings(tiny_llama, data_dir, tmp_path / str(number), max_steps=1, **more))
    assert len(calls) == 1
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "2", max_steps=1, cutoff_len=40))
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "3", max_steps=1, seed=4))
    assert len(calls) == 3, "other rows, or another adapter to start from, are scored anew"
    first = tmp_path / "cache" / "quality"
    for path in first.iterdir():
        path.write_bytes(b"damaged")
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "4", max_steps=1))
    assert len(calls) == 4


def test_collapsed_weights_are_warned_of_once(tiny_llama, data_dir, tmp_path, monkeypatch):
    from llamafactory_adaptive.training import sample_selection

    said: list[str] = []
    monkeypatch.setattr(sample_selection.logger, "warning", said.append)
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "a", tsq_temperature=0.05))
    assert len(said) == 1
    assert "below 10% of the subset of 17" in said[0]
    advised = float(said[0].split("tsq_temperature from 0.05 to ")[1].split(",")[0])
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "b", tsq_temperature=advised))
    assert len(said) == 1, "the advice helps"


def test_texts_stay_out_of_what_is_pushed_to_a_hub(tiny_llama, data_dir, tmp_path, monkeypatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *a, **k: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *a, **k: None)
    out = tmp_path / "out"
    train(tsq_settings(tiny_llama, data_dir, out, max_steps=1, push_to_hub=True, hub_model_id="x/y"))
    texts = (out / DATA_REPORT_FILE).read_text() + (out / SAMPLES_FILE).read_text()
    assert "Human" not in texts
    assert "left out: push_to_hub" in texts


def test_duplicates_are_reported(tiny_llama, data_dir, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    rows = json.loads((data / "sft.json").read_text())
    (data / "sft.json").write_text(json.dumps([*rows, rows[3], rows[3], rows[5]]))
    train(tsq_settings(tiny_llama, data, tmp_path / "out", max_steps=1))
    report = read_data_report(tmp_path / "out")
    assert report["duplicates"] == {"groups": 2, "samples": 5, "largest": [[3, 24, 25], [5, 26]]}
    assert [s["index"] for s in samples(tmp_path / "out") if s.get("duplicate_of") == 3] == [24, 25]
    of_equal = [samples(tmp_path / "out")[index]["quality"] for index in (3, 24, 25)]
    assert max(of_equal) - min(of_equal) < 1e-3


def test_a_tokenised_folder_is_sampled(tiny_llama, data_dir, tmp_path):
    folder = tmp_path / "tokenised"
    args = tsq_settings(tiny_llama, data_dir, tmp_path / "a", tokenized_path=str(folder), max_steps=2)
    train({k: v for k, v in args.items() if not k.startswith("tsq_")} | {"adaptive_method": "uniform"})
    assert folder.is_dir()
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "b", tokenized_path=str(folder), max_steps=2))
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "c", max_steps=2))
    first, second = ([s["gradient_norm"] for s in samples(tmp_path / name)] for name in "bc")
    assert first == second


def test_report_shows_runs_and_refuses_what_is_none(tiny_llama, data_dir, tmp_path, capsys):
    from llamafactory_adaptive.cli import main

    train(tsq_settings(tiny_llama, data_dir, tmp_path / "a"))
    capsys.readouterr()
    assert main(["report", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "best samples" in said
    assert "weights amount to" in said
    assert "(tsq, 14 modules)" in said
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "there is no run in" in capsys.readouterr().err


def test_wrong_options_are_named_before_anything_is_loaded(tiny_llama, data_dir, tmp_path):
    zero3 = str(Path(__file__).parents[2] / "examples" / "deepspeed" / "ds_z3_config.json")
    wrong = {
        "packing": ({"packing": True}, "a packed row holds several samples"),
        "neat_packing": ({"neat_packing": True}, "packing: None is invalid: a packed row"),
        "streaming": ({"streaming": True}, "a stream has no known length"),
        "stage": ({"stage": "dpo", "dataset": "tiny_pairs"}, "tsq_sampling: false"),
        "shuffling": ({"disable_shuffling": True}, "in the order in which they are drawn"),
        "strategy": ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: random"),
        "fp16": ({"fp16": True}, "not loss-scaled and would vanish"),
        "deepspeed": ({"deepspeed": zero3}, "samples are scored with whole weights on every process"),
        "inline": ({"deepspeed": '{"zero_optimization": {"stage": 3}}'}, "whole weights on every process"),
        "squares": ({"optim": "rmsprop_bnb"}, "where this optimizer keeps them per weight is not known"),
        "optim": ({"optim": "adafactor"}, "optim: 'adafactor' is invalid: components that come back"),
        "galore": ({"use_galore": True}, "use_galore: True is invalid"),
        "interval": ({"adaptive_interval": 5}, "adaptive_method: tsq moves ranks about and prunes nothing"),
        "calibration": ({"adaptive_calibration_samples": 5}, "calibrates nothing"),
        "weights": ({"tsq_norm_weight": 0, "tsq_loss_drop_weight": 0}, "every sample would be as good as any"),
        "phi": (
            {"tsq_phi": "quality", "adaptive_min_rank": 3},
            "adaptive_min_rank: 3 is invalid: the budget may",
        ),
        "ratio": ({"tsq_subset_ratio": 1.5}, "tsq_subset_ratio: 1.5 is invalid: must be between 1e-06 and 1"),
        "refresh": ({"tsq_refresh_ratio": 0.9}, "must be between 0.0001 and 0.5"),
        "adapter": ({"adapter_name_or_path": "x"}, "ranks are found on a new adapter"),
        "min_rank": ({"adaptive_min_rank": 0}, "would never come back"),
        "batching": ({"accelerator_config": {"split_batches": True}}, "by the default batching alone"),
        "idle": ({"tsq_step_size": 0.1}, "tsq_step_size: 0.1 is invalid: only tsq_loss_drop: exact takes a step"),
    }
    for name, (change, message) in wrong.items():
        with pytest.raises(AdaptiveConfigError) as caught:
            train(tsq_settings(tiny_llama, data_dir, tmp_path / name, **change))
        assert message in str(caught.value), name
        assert not (tmp_path / name).exists()


def test_load_best_from_before_the_first_refresh_does_not_end_as_uniform_lora(
    tiny_llama, data_dir, tmp_path, monkeypatch
):
    from llamafactory_adaptive.training import rank_search_driver

    said: list[str] = []
    monkeypatch.setattr(rank_search_driver.logger, "warning", said.append)
    out = tmp_path / "out"
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
            "adaptive_best_model_from": "start"}  # fmt: skip
    every_two = {**EVALUATE, "eval_steps": 2, "save_steps": 2}  # at step 1 all sensitivities are 0, since B is
    train(tsq_settings(tiny_llama, data_dir, out, tsq_sampling=False, learning_rate=1e-2, **every_two, **best))
    state = json.loads((out / "trainer_state.json").read_text())
    step = int(state["best_model_checkpoint"].rpartition("-")[2])
    assert step < 3, "before the first refresh"
    assert allocations(out)[-1]["step"] == step
    ranks = load_plan(out / "adaptive_rank_plan.json").ranks()
    assert list(ranks.values()) == allocations(out)[-1]["ranks"]
    assert len(set(ranks.values())) > 2
    (warning,) = said
    assert f"ranks were not yet found at step {step} " in warning


def test_restarted_components_train_again(tiny_llama, data_dir, tmp_path):
    """Modules that grew at a refresh have a B that moved from zero in the end."""
    out = tmp_path / "out"
    train(tsq_settings(tiny_llama, data_dir, out, tsq_sampling=False))
    before, after = allocations(out)[0]["ranks"], allocations(out)[1]["ranks"]
    assert any(new > old for old, new in zip(before, after, strict=True))
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(bool((tensor != 0).any(0).all()) for key, tensor in tensors.items() if "lora_B" in key)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
