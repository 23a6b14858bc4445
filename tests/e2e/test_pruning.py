"""Runs that find their ranks while they train, through LLaMA-Factory's own entry, in this process, on tiny models."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from llamafactory_adaptive import cli
from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.second_stage import given_plan
from tests.helpers.tiny import pruning_settings, save_tiny, settings, svd_settings
from tests.helpers.training import EVALUATE, Keep, adapters_equal, allocations, lines, logits, peft_logits, train


pytestmark = pytest.mark.slow
EACH_ARCHITECTURE = ["llama", pytest.param("qwen2", marks=pytest.mark.repeats), "qwen3"]


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_the_adapter_is_cut_to_the_ranks_found_and_equals_the_live_model(architecture, data_dir, tmp_path):
    base = save_tiny(tmp_path / "base", architecture)
    out = tmp_path / "out"
    more = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 1, "igu_returns": "former"}
    keep = train(pruning_settings(base, data_dir, out, **more))
    plan = load_plan(out / "adaptive_rank_plan.json")
    assert plan.method == "igu"
    assert len(set(plan.ranks().values())) > 2
    assert 0 <= plan.budget()["left_parameters"] < min(m.parameters_per_rank for m in plan.modules if m.rank < 8)
    tensors = load_file(out / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == plan.budget()["used_parameters"]
    live = logits(keep.model)
    with keep.model.disable_adapter():
        assert (logits(keep.model) - live).abs().max() > 1e-3, "the adapter should do something"
    assert (peft_logits(base, out) - live).abs().max() <= 1e-4

    events = allocations(out)
    assert [line["step"] for line in events] == [2, 4, 6, 8]
    assert all(line["budget_used"] <= line["budget_asked"] for line in events)
    assert [line["budget_asked"] for line in events] == sorted((line["budget_asked"] for line in events), reverse=True)
    assert events[-1]["final"]
    assert events[-1]["budget_asked"] == 4096 == plan.budget()["asked_parameters"]
    assert events[-1]["ranks"] == list(plan.ranks().values())
    assert any(line["grown"] for line in events), "components should come back, too"
    assert any(line["shrunk"] for line in events)
    assert events[-1]["counters"]["observations"] == 8, "nothing is scored once the ranks are final"

    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    seen = [entry["adaptive/budget_used"] for entry in history if "adaptive/budget_used" in entry]
    assert seen[-1] == events[-1]["budget_used"]
    for picture in ("adaptive_ranks.png", "adaptive_rank_history.png"):
        assert (out / picture).stat().st_size > 5000
    assert "## Adaptive ranks: igu" in (out / "README.md").read_text()

    # A checkpoint is a plain adapter at the full live shape that can be served as it is.
    config = json.loads((out / "checkpoint-5" / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["lora_alpha"] / config["r"] == 2.0
    assert torch.isfinite(peft_logits(base, out / "checkpoint-5")).all()


@pytest.fixture
def on_ranks_of_a_plan(tiny_llama, data_dir, tmp_path):
    """Settings of a run on given ranks."""
    path = tmp_path / "plan.json"
    given_plan().save(path)

    def make(folder, **more):
        given = pruning_settings(tiny_llama, data_dir, tmp_path / folder, adaptive_plan=str(path), max_steps=4, **more)
        return {key: value for key, value in given.items() if key != "adaptive_interval"}

    return make


def test_a_second_run_trains_the_given_ranks_in_the_authors_form(
    on_ranks_of_a_plan, tiny_llama, tmp_path, monkeypatch, capfd
):
    """By the command; then again from its checkpoint, bit for bit."""
    from llamafactory import launcher

    for place, name in ((launcher, "__file__"), (sys, "argv")):  # which the command changes
        monkeypatch.setattr(place, name, getattr(place, name))
    more = {"igu_variant": "published", "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False}
    config, out, again = tmp_path / "x.yaml", tmp_path / "out", tmp_path / "again"
    config.write_text(yaml.safe_dump(on_ranks_of_a_plan("out", **more)))
    assert cli.main(["train", str(config)]) == 0
    said = "".join(capfd.readouterr())
    assert "train as P diag(lambda) Q, the second stage of igu; nothing is scored" in said
    assert "these keys are not used" not in said
    plan = load_plan(out / "adaptive_rank_plan.json")
    assert plan.ranks() == load_plan(tmp_path / "plan.json").ranks()
    assert [(line["step"], line["counters"]["allocations"]) for line in lines(out)] == [(0, 0)]
    assert not (out / "adaptive_rank_history.png").exists()
    with safe_open(out / "checkpoint-2" / "adaptive_state.safetensors", "pt") as file:
        kinds = [key.partition(".")[0] for key in file.keys()]  # noqa: SIM118
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(("lambda", "P", "Q"), len(plan.active))

    shutil.copytree(out / "checkpoint-2", again / "checkpoint-2")
    keep = train(on_ranks_of_a_plan("again", **more))
    assert adapters_equal(out, again)
    assert (peft_logits(tiny_llama, again) - logits(keep.model)).abs().max() <= 1e-5


def test_a_second_run_with_plain_lora_is_that_of_every_other_method(on_ranks_of_a_plan, tmp_path):
    train(on_ranks_of_a_plan("igu", igu_second_stage="lora"))
    train(on_ranks_of_a_plan("other", adaptive_method="adalora"))
    assert adapters_equal(tmp_path / "igu", tmp_path / "other")


CASES = {
    "adalora": {"adaptive_method": "adalora", "lora_dropout": 0.1},
    "integrated": {"igu_importance": "integrated", "igu_probe_interval": 2, "lora_dropout": 0.1},
    "off": {"igu_importance": "off", "igu_orthogonality": "identity", "igu_orthogonality_weight": 0.1,
            "igu_uncertainty": "product", "igu_lambda_term": "magnitude"},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "no_clipping": {"max_grad_norm": 0.0, "igu_orthogonality": "none"},
    "bf16_no_checkpointing": {"bf16": True, "disable_gradient_checkpointing": True},
    "ranks_budget": {"adaptive_budget_unit": "ranks", "adaptive_min_rank": 0},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.0},
    "dpo": {"stage": "dpo", "dataset": "tiny_pairs", "pref_beta": 0.1},
    "kto": {"stage": "kto", "dataset": "tiny_kto"},
    "rm": {"stage": "rm", "dataset": "tiny_pairs", "save_strategy": "steps", "save_steps": 6},
    "pt": {"stage": "pt", "dataset": "tiny_raw", "igu_importance": "integrated", "additional_target": "embed_tokens"},
    "packing": {"packing": True, "neat_packing": True},
    "4bit": {"quantization_bit": 4, "bf16": True},
    "8bit": {"quantization_bit": 8, "bf16": True},
    "loraplus": {"loraplus_lr_ratio": 4.0, "lora_target": "q_proj,down_proj", "additional_target": "embed_tokens"},
    "one_step": {"max_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_options_and_stages_prune_to_the_budget(case, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    train(pruning_settings(tiny_llama, data_dir, out, **CASES[case]))
    plan, last = load_plan(out / "adaptive_rank_plan.json"), allocations(out)[-1]
    assert last["final"]
    assert last["budget_used"] <= last["budget_asked"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {m.name: m.rank for m in plan.active}
    counters = last["counters"]
    if case == "ranks_budget":
        assert plan.budget()["left_ranks"] == 0
    if case == "integrated":
        assert counters["probes"] == counters["observations"] == 4  # steps 0, 2, 4, 6
    if case == "accumulation":
        assert counters["observations"] == last["step"], "optimizer steps count, not micro-batches"


@pytest.mark.parametrize("final_ratio", [0.3, pytest.param(0.0, marks=pytest.mark.repeats)])
def test_an_over_ranked_adapter_is_cut_once_by_its_singular_values(final_ratio, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    keep = train(svd_settings(tiny_llama, data_dir, out, adaptive_final_ratio=final_ratio))
    (only,) = allocations(out)
    assert only["step"] == (8 if final_ratio else 12)
    plan = load_plan(out / "adaptive_rank_plan.json")
    assert len(set(plan.ranks().values())) > 1
    cheapest = min(module.parameters_per_rank for module in plan.modules)
    assert 0 <= only["budget_asked"] - only["budget_used"] < cheapest
    assert sum(t.numel() for t in load_file(out / "adapter_model.safetensors").values()) == only["budget_used"]
    assert (peft_logits(tiny_llama, out) - logits(keep.model)).abs().max() <= 1e-4


def test_evaluation_sees_the_masked_model_unscaled(tiny_llama, data_dir, tmp_path):
    """Loss of an evaluation while the training forward runs at random positions: the one its checkpoint gives."""
    out = tmp_path / "out"
    train(pruning_settings(tiny_llama, data_dir, out, **EVALUATE))
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    again = {**settings(tiny_llama, data_dir, tmp_path / "again"), "do_train": False, "do_eval": True,
             "finetuning_type": "lora", "adapter_name_or_path": str(out / "checkpoint-5"),
             "eval_dataset": "tiny_eval", "dataset": None}  # fmt: skip
    train({key: value for key, value in again.items() if not key.startswith("adaptive_")})
    fresh = json.loads((tmp_path / "again" / "eval_results.json").read_text())["eval_loss"]
    assert fresh == pytest.approx(logged[5], abs=1e-6)
    assert len(set(logged.values())) > 6


def test_early_stopping_and_load_best_end_within_budget(tiny_llama, data_dir, tmp_path):
    """The best checkpoint is from before the ranks were final: it is pruned to the budget, and says so."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            control.should_training_stop = state.global_step == 5

    from llamafactory_adaptive import _bootstrap

    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    out, keep = tmp_path / "out", Keep()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
            "adaptive_best_model_from": "start"}  # fmt: skip
    run_exp(pruning_settings(tiny_llama, data_dir, out, **EVALUATE, **best), [keep, Stop()])
    plan, last = load_plan(out / "adaptive_rank_plan.json"), allocations(out)[-1]
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    assert last["step"] == int(state["best_model_checkpoint"].rpartition("-")[2])
    assert last["final"]
    assert plan.budget()["left_parameters"] >= 0
    assert (peft_logits(tiny_llama, out) - logits(keep.model)).abs().max() <= 1e-4


def test_a_diverged_run_is_not_pruned_by_nan(tiny_llama, data_dir, tmp_path):
    with pytest.raises(GuardError, match=r"training (has )?diverged[,;] lower learning_rate"):
        train(pruning_settings(tiny_llama, data_dir, tmp_path / "o", learning_rate=1e30, max_grad_norm=0.0))


def test_processes_that_would_choose_differently_stop(tiny_llama, data_dir, tmp_path, monkeypatch):
    from llamafactory_adaptive.engines import distributed

    monkeypatch.setattr(distributed, "gather_digests", lambda digest: [digest, "00"])
    with pytest.raises(GuardError, match=r"ranks \[1\] hold another plan than rank 0"):
        train(pruning_settings(tiny_llama, data_dir, tmp_path / "o"))
    answers = iter([["a", "a"], ["a", "b"]])
    monkeypatch.setattr(distributed, "gather_digests", lambda digest: next(answers))
    with pytest.raises(GuardError, match=r"ranks \[1\] chose other components than rank 0"):
        train(pruning_settings(tiny_llama, data_dir, tmp_path / "o"))


def test_a_run_that_never_allocated_fails(tiny_llama, data_dir, tmp_path, monkeypatch):
    from llamafactory_adaptive.training.rank_search_driver import RankSearchDriver

    monkeypatch.setattr(RankSearchDriver, "see_gradients", lambda self: None)  # as if the hook had never fired
    with pytest.raises(GuardError, match="components are to be chosen at step 2, but none was observed"):
        train(pruning_settings(tiny_llama, data_dir, tmp_path / "o"))


def test_loss_of_the_static_path_does_not_pay_for_the_dynamic_one(tiny_llama, data_dir, tmp_path):
    """A static run in the same process after a dynamic one: no triplets, no hooks, no keys left over."""
    train(pruning_settings(tiny_llama, data_dir, tmp_path / "a"))
    keep = train(settings(tiny_llama, data_dir, tmp_path / "b", adaptive_method="uniform"))
    assert not any("lambda" in name for name, _ in keep.model.named_parameters())
    with pytest.raises(AdaptiveConfigError, match="fixes ranks before training and prunes nothing"):
        train(settings(tiny_llama, data_dir, tmp_path / "c", adaptive_method="uniform", adaptive_interval=3))


def test_off_in_a_yaml_is_a_word(tiny_llama, data_dir, tmp_path):
    """YAML reads a bare ``off`` as false."""
    from llamafactory_adaptive.bridge.validation import parse_config

    path = tmp_path / "x.yaml"
    args = pruning_settings(tiny_llama, data_dir, tmp_path / "out")
    path.write_text(yaml.safe_dump(args) + "igu_importance: off\n")
    assert parse_config(yaml.safe_load(path.read_text())).options["importance"] == "off"


def test_what_else_trains_is_not_touched_by_probes(tiny_llama, data_dir, tmp_path):
    """The same run with and without probing trains the same embeddings up to the first allocation."""
    more = {"additional_target": "embed_tokens", "max_steps": 4, "adaptive_warmup_ratio": 0.6, "learning_rate": 1e-3,
            "adaptive_interval": 100}  # fmt: skip
    runs = {}
    for importance in ("off", "integrated"):
        out = tmp_path / importance
        train(pruning_settings(tiny_llama, data_dir, out, igu_importance=importance, **more,
                               save_strategy="steps", save_steps=2))  # fmt: skip
        runs[importance] = load_file(out / "checkpoint-2" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in runs["off"])
    assert all(torch.equal(runs["off"][key], runs["integrated"][key]) for key in runs["off"])
