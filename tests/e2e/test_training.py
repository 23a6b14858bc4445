"""Real training runs through LLaMA-Factory's own entry, in this process, on tiny models."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError, PlanError
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.tiny import ARCHITECTURES, save_tiny, settings, tiny_model, unmeasured_settings
from tests.helpers.training import logits, peft_logits, train


pytestmark = pytest.mark.slow
EACH_ARCHITECTURE = ["llama", *(pytest.param(name, marks=pytest.mark.repeats) for name in ("qwen2", "qwen3"))]


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_saved_adapter_in_plain_peft_equals_the_live_model(architecture, data_dir, tmp_path):
    base = save_tiny(tmp_path / "base", architecture)
    out = tmp_path / "out"
    keep = train(settings(base, data_dir, out, max_steps=3))
    plan = load_plan(out / "adaptive_rank_plan.json")
    assert len(set(plan.ranks().values())) > 1, "the plan should not be uniform"
    live = logits(keep.model)
    with keep.model.disable_adapter():
        assert (logits(keep.model) - live).abs().max() > 1e-3, "the adapter should have learned something"
    assert (peft_logits(base, out) - live).abs().max() <= 1e-4

    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["r"] == max(plan.ranks().values())
    assert config["lora_alpha"] / config["r"] == 2.0
    assert config["rank_pattern"] == {k: v for k, v in plan.ranks().items() if v}
    assert sorted(config["target_modules"]) == sorted(config["rank_pattern"])
    assert all(config["alpha_pattern"][k] / v == 2.0 for k, v in config["rank_pattern"].items())
    assert not config["use_rslora"]
    assert not config["use_dora"]
    tensors = load_file(out / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == plan.budget()["used_parameters"]
    assert 0 <= plan.budget()["left_parameters"] < min(m.parameters_per_rank for m in plan.modules)
    assert (out / "adaptive_ranks.png").stat().st_size > 5000
    assert "## Adaptive ranks: sensitivity" in (out / "README.md").read_text()
    line = json.loads((out / "adaptive_log.jsonl").read_text().splitlines()[0])
    assert line["counters"]["modules_checked"] == 14


FAST = {"adaptive_method": "random"}  # no measuring process: these cases are about training
STAGES = {
    "pt": {"stage": "pt", "dataset": "tiny_raw"},
    "dpo": {"stage": "dpo", "dataset": "tiny_pairs", "pref_beta": 0.1},
    "kto": {"stage": "kto", "dataset": "tiny_kto"},
    "rm": {"stage": "rm", "dataset": "tiny_pairs", **FAST},
    "packing": {"packing": True, **FAST},
    "neat_packing": {"packing": True, "neat_packing": True, **FAST},
    "no_checkpointing": {"disable_gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "ranks_budget": {"adaptive_budget_unit": "ranks", "adaptive_method": "random", "adaptive_min_rank": 0,
                     "adaptive_calibration_seed": 2},
    "loraplus": {"loraplus_lr_ratio": 4.0},
    "dropout": {"lora_dropout": 0.1},
    "best": {"eval_dataset": "tiny_eval", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
             "save_steps": 1, "load_best_model_at_end": True, "eval_on_start": True},
    "streaming": {"streaming": True, "dataloader_num_workers": 1},
    "gradient_weighting": {"sensitivity_weighting": "gradient", "sensitivity_transform": "per_type"},
    "targets": {**FAST, "lora_target": "q_proj,down_proj", "additional_target": "embed_tokens"},
}  # fmt: skip


# As dpo, as in the cases of igu and tsq, and as in tests of methods and of calibration.
REPEATED_STAGES = ("kto", "bf16", "no_checkpointing", "accumulation", "streaming", "gradient_weighting")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.repeats] if case in REPEATED_STAGES else []) for case in STAGES]
)
def test_stages_and_options_train_on_a_plan(case, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    train(settings(tiny_llama, data_dir, out, **STAGES[case]))
    plan = load_plan(out / "adaptive_rank_plan.json")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {m.name: m.rank for m in plan.active}
    assert len(set(config["rank_pattern"].values())) > 1
    if case == "ranks_budget":
        assert plan.budget()["left_ranks"] == 0
        assert len(plan.active) < len(plan.modules)
    if case == "targets":
        assert {m.name.rpartition(".")[2] for m in plan.modules} == {"q_proj", "down_proj"}
        assert any("embed_tokens" in key for key in load_file(out / "adapter_model.safetensors"))


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.repeats)])
def test_quantised_bases_train_and_the_adapter_fits_the_full_precision_base(bits, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    more = {"quantization_bit": bits, "bf16": True, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1,
            "eval_dataset": "tiny_eval", "max_steps": 3}  # fmt: skip
    train(settings(tiny_llama, data_dir, out, **more))
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(bool(t.any()) for name, t in tensors.items() if "lora_B" in name), "every module should be trained"
    assert torch.isfinite(peft_logits(tiny_llama, out)).all()


def test_a_run_that_has_ended_trains_and_writes_nothing_when_asked_again(tiny_llama, data_dir, tmp_path, capsys):
    args = unmeasured_settings(tiny_llama, data_dir, tmp_path / "out", save_strategy="steps", save_steps=1)
    args["overwrite_output_dir"] = False
    train(args)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    capsys.readouterr()
    train(args)
    assert "has ended at its last step: nothing was trained or written" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()} == before


def test_interrupted_and_resumed_equals_uninterrupted(tiny_llama, data_dir, tmp_path):
    more = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": False}
    train(settings(tiny_llama, data_dir, tmp_path / "uninterrupted", **more))
    with pytest.raises(KeyboardInterrupt):
        train(settings(tiny_llama, data_dir, tmp_path / "cut", **more), crash_at=3)
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    train(settings(tiny_llama, data_dir, tmp_path / "cut", **more))  # found by itself, as upstream does
    uninterrupted, cut = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("uninterrupted", "cut")
    )
    assert uninterrupted.keys() == cut.keys()
    assert all(torch.equal(uninterrupted[key], cut[key]) for key in uninterrupted)
    assert (load_plan(tmp_path / "uninterrupted" / "adaptive_rank_plan.json").digest()
            == load_plan(tmp_path / "cut" / "checkpoint-2" / "adaptive_rank_plan.json").digest())  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 8}, "lora_rank is 4 there and 8 here"),
        ({"adaptive_method": "random"}, "adaptive_method is sensitivity there and random here"),
        ({"sensitivity_transform": "none"}, "sensitivity_transform is log there and none here"),
        ({"model": {"intermediate_size": 48}}, "is 32x64 in the plan, 32x48 in the model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, message, tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    more = {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False, "max_steps": 1}
    train(settings(tiny_llama, data_dir, out, **more))
    before = (out / "adapter_model.safetensors").read_bytes()
    change = dict(change)
    base = save_tiny(tmp_path / tiny_llama.name, **change.pop("model")) if "model" in change else tiny_llama
    with pytest.raises(PlanError, match=message):
        train(settings(base, data_dir, out, **{**more, "max_steps": 3, **change}))
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_going_on_from_an_adapter_and_merging_it_under_a_new_one(tiny_llama, data_dir, tmp_path):
    first = tmp_path / "first"
    train(settings(tiny_llama, data_dir, first))
    ranks = load_plan(first / "adaptive_rank_plan.json").ranks()
    on = tmp_path / "on"
    train(settings(tiny_llama, data_dir, on, adapter_name_or_path=str(first)))
    assert load_plan(on / "adaptive_rank_plan.json").ranks() == ranks
    a, b = (load_file(f / "adapter_model.safetensors") for f in (first, on))
    assert any(not torch.equal(a[key], b[key]) for key in a)
    new = tmp_path / "new"
    train(settings(tiny_llama, data_dir, new, adapter_name_or_path=str(first), create_new_adapter=True, lora_rank=2))
    assert load_plan(new / "adaptive_rank_plan.json").lora_rank == 2
    (first / "adaptive_rank_plan.json").unlink()
    with pytest.raises(PlanError, match="create_new_adapter: true to merge it"):
        train(settings(tiny_llama, data_dir, tmp_path / "x", adapter_name_or_path=str(first)))


def test_a_plan_edited_by_hand_is_trained_and_one_over_budget_is_not(tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    train(settings(tiny_llama, data_dir, out, adaptive_method="uniform"))
    path = tmp_path / "mine.json"
    document = json.loads((out / "adaptive_rank_plan.json").read_text())
    by_name = {entry["name"]: entry for entry in document["modules"]}
    by_name["model.layers.0.self_attn.q_proj"]["rank"] = 0
    by_name["model.layers.1.self_attn.q_proj"]["rank"] = 8
    path.write_text(json.dumps(document))
    train(settings(tiny_llama, data_dir, tmp_path / "edited", adaptive_plan=str(path)))
    config = json.loads((tmp_path / "edited" / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert config["lora_alpha"] == 16
    assert "model.layers.0.self_attn.q_proj" not in config["rank_pattern"]
    by_name["model.layers.0.mlp.up_proj"]["rank"] = 9
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"costs 4,576 parameters.*is 4,096: 480 too many.*lora_rank: 5"):
        train(settings(tiny_llama, data_dir, tmp_path / "never", adaptive_plan=str(path)))
    assert not (tmp_path / "never").exists()


def test_statistics_are_measured_once_for_every_budget(tiny_llama, data_dir, tmp_path, monkeypatch):
    from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun

    train(settings(tiny_llama, data_dir, tmp_path / "a", seed=77))
    monkeypatch.setattr(LlamaFactoryRun, "measure", lambda *a: pytest.fail("measured again"))
    train(settings(tiny_llama, data_dir, tmp_path / "b", seed=77, lora_rank=6, sensitivity_energy=0.5))
    train(settings(tiny_llama, data_dir, tmp_path / "c", seed=77, adaptive_calibration_batch_size=1))
    plans = [load_plan(tmp_path / name / "adaptive_rank_plan.json") for name in "abc"]
    assert plans[0].provenance["statistics_reused"] is False
    assert 2**20 < plans[0].provenance["calibration_peak_memory"]["host"] < 2**40
    assert plans[1].provenance["statistics_reused"] is True
    assert plans[0].ranks() == plans[2].ranks()


def test_held_out_rows_do_not_reach_the_scores(tiny_llama, data_dir, tmp_path):
    """With val_size the calibration draws from the training part only: all of it, and nothing else.

    Packing is on: rows are scored unpacked all the same. The tokenised folder is left for the run itself to write.
    """
    tokens = tmp_path / "tokens"
    more = {"val_size": 0.25, "packing": True, "tokenized_path": str(tokens), "adaptive_calibration_samples": 500}
    train(settings(tiny_llama, data_dir, tmp_path / "o", **more))
    plan = load_plan(tmp_path / "o" / "adaptive_rank_plan.json")
    assert plan.provenance["calibration_samples"] == 18
    assert {path.name for path in tokens.iterdir()} >= {"train", "validation"}


def test_a_run_whose_ranks_never_reached_the_model_fails(tiny_llama, data_dir, tmp_path, monkeypatch):
    from llamafactory_adaptive.bridge import training_run
    from llamafactory_adaptive.training import trainer

    lost = type("Lost", (), {"get": lambda s: None, "set": lambda s, v: None, "reset": lambda s, t: None})()
    for module in (trainer, training_run):
        monkeypatch.setattr(module, "current_run", lost)
    monkeypatch.setattr(training_run, "inject_ranks", lambda original: original)
    with pytest.raises(GuardError, match=r"does not match the plan \(14 adapted modules, 14 planned\)"):
        train(settings(tiny_llama, data_dir, tmp_path / "o"))


def test_missing_gradients_fail_with_the_counters(tiny_llama, data_dir, tmp_path):
    class Freeze(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            next(p for n, p in model.named_parameters() if "lora_B" in n).requires_grad_(False)

    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    with pytest.raises(GuardError, match="gradients_missing=1"):
        run_exp(settings(tiny_llama, data_dir, tmp_path / "o"), [Freeze()])


def test_a_nan_adapter_is_not_called_done(tiny_llama, data_dir, tmp_path):
    with pytest.raises(GuardError, match=r"holds NaN or infinity|training diverged; lower learning_rate"):
        train(settings(tiny_llama, data_dir, tmp_path / "o", learning_rate=1e30, max_steps=4, max_grad_norm=0.0))
    assert not (tmp_path / "o" / "adapter_model.safetensors").exists()


def test_a_plain_lora_run_is_untouched(tiny_llama, data_dir, tmp_path):
    args = settings(tiny_llama, data_dir, tmp_path / "o", finetuning_type="lora")
    stray = {key: value for key, value in args.items() if not key.startswith("adaptive_")}
    train(stray)
    config = json.loads((tmp_path / "o" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {}
    assert not (tmp_path / "o" / "adaptive_rank_plan.json").exists()
    with pytest.raises(AdaptiveConfigError, match=r"adaptive_calibration_samples.* would have no effect"):
        train(args)


def test_a_finished_run_is_not_overwritten(tiny_llama, data_dir, tmp_path):
    args = settings(tiny_llama, data_dir, tmp_path / "o", adaptive_method="uniform", overwrite_output_dir=False)
    train(args)
    with pytest.raises(AdaptiveConfigError, match="it holds a finished run; try overwrite_output_dir: true"):
        train(args)


def test_nothing_unchecked_is_pushed(tiny_llama, data_dir, tmp_path):
    """The callback sees the final push after the final save; a damaged adapter stops it."""
    from llamafactory_adaptive.training.bound_run import RunRequest
    from llamafactory_adaptive.training.callback import AdaptiveCallback
    from llamafactory_adaptive.training.guard import PlanGuard
    from llamafactory_adaptive.training.run_log import RunLog

    out = tmp_path / "o"
    train(settings(tiny_llama, data_dir, out, adaptive_method="random"))
    guard = PlanGuard(load_plan(out / "adaptive_rank_plan.json"), RunLog("random", 0.0))
    callback = AdaptiveCallback(guard, RunRequest(3))
    arguments = type("Arguments", (), {"output_dir": str(out)})()
    callback.on_push_begin(arguments, None, None)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    with pytest.raises(GuardError, match="lora_alpha / r is"):
        callback.on_push_begin(arguments, None, None)


def test_a_different_plan_in_output_dir_is_kept(tiny_llama, data_dir, tmp_path):
    out = tmp_path / "o"
    train(settings(tiny_llama, data_dir, out, adaptive_method="uniform"))
    digest = load_plan(out / "adaptive_rank_plan.json").digest()
    train(settings(tiny_llama, data_dir, out, adaptive_method="random"))
    older = load_plan(out / "_adaptive_previous" / "1" / "adaptive_rank_plan.json")
    assert (older.method, older.digest()) == ("uniform", digest)


def test_tiny_models_differ_by_architecture():
    """The oracle's own check: the three architectures are not one in disguise."""
    assert len({type(tiny_model(name)).__name__ for name in ARCHITECTURES}) == 3
