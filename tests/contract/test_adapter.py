"""PEFT reads our configs as we mean them, and every clause of the saved-adapter contract can fail."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llamafactory_adaptive.adapter.lora import lora_config_arguments, name_targets_in_full
from llamafactory_adaptive.adapter.verify import check_live, check_saved
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from tests.helpers.tiny import TARGETS, tiny_model


def plan_for(model, ranks):
    modules = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in TARGETS]
    get = model.get_submodule
    made = tuple(
        ModulePlan(n, get(n).in_features, get(n).out_features, rank=ranks[i % len(ranks)])
        for i, n in enumerate(modules)
    )
    return RankPlan("random", {}, "params", 4, 10.0, made)  # alpha/r = 2.5: some alphas are no integers


@pytest.fixture(params=[2, 12])
def adapted(request):
    """A model with mixed ranks and some modules dropped; 12 layers so that `layers.1` could also mean `layers.11`."""
    model = tiny_model(num_hidden_layers=request.param)
    plan = plan_for(model, (1, 3, 0, 8, 5))
    live = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora_config_arguments(plan)))
    for name, parameter in live.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return live, plan


@pytest.fixture
def saved(adapted, tmp_path):
    live, plan = adapted
    name_targets_in_full(live, plan)
    live.save_pretrained(tmp_path)
    return tmp_path, plan


def test_live_and_saved_adapters_are_the_plan(adapted, saved):
    live, plan = adapted
    assert check_live(live, plan) == len(plan.active)
    assert check_saved(*saved) == 0


def test_a_server_that_ignores_the_patterns_scales_right(saved):
    folder, plan = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == plan.scale == 2.5
    assert all(config["alpha_pattern"][k] / r == plan.scale for k, r in config["rank_pattern"].items())


def test_live_differences_are_named(adapted):
    live, plan = adapted
    other = plan_for(tiny_model(num_hidden_layers=len(live.base_model.model.model.layers)), (3, 3, 0, 8, 5))
    with pytest.raises(GuardError, match=r"q_proj has A \(1, 32\) and B \(32, 1\) for rank 3"):
        check_live(live, other)
    with pytest.raises(GuardError, match=r"v_proj is planned but has no adapter"):
        check_live(live, plan_for(tiny_model(num_hidden_layers=2), (1, 3, 2)))
    layer = live.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] = 1.0
    with pytest.raises(GuardError, match=r"q_proj is scaled by 1.0, not 2.5"):
        check_live(live, plan)


NAME = "model.layers.0.self_attn.q_proj"
CONFIG_FAULTS = [
    (lambda c: c.update(peft_type="ADALORA"), "peft_type is ADALORA"),
    (lambda c: c.update(use_rslora=True), "use_rslora is set"),
    (lambda c: c.update(r=4), "r is 4, the largest rank in use is 8"),
    (lambda c: c.update(lora_alpha=8), r"lora_alpha / r is 1.0, not 2.5"),
    (lambda c: c["target_modules"].remove(NAME), r"target_modules: .*q_proj is planned but has no adapter"),
    (lambda c: c.update(target_modules=["q_proj"]), r"target_modules: .* is planned but has no adapter"),
    (lambda c: c["rank_pattern"].pop(NAME), r"q_proj is planned but has no adapter"),
    (lambda c: c["rank_pattern"].update({NAME: 7}), r"rank_pattern gives .*q_proj 7, planned 1"),
    (lambda c: c["alpha_pattern"].update({NAME: 7}), r"alpha_pattern gives .*q_proj 7"),
    (lambda c: c.update(rank_pattern={"q_proj": 1, **c["rank_pattern"]}), r"the pattern q_proj also hits"),
]


@pytest.mark.parametrize(("damage", "message"), CONFIG_FAULTS)
def test_each_clause_of_the_config_is_checked(damage, message, saved):
    folder, plan = saved
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    damage(config)
    path.write_text(json.dumps(config))
    with pytest.raises(GuardError, match=message):
        check_saved(folder, plan)


def _change(tensors, key, make):
    tensors[key] = make(tensors[key])


A, B = (f"base_model.model.{NAME}.lora_{side}.weight" for side in "AB")
TENSOR_FAULTS = [
    (lambda t: _change(t, A, lambda x: torch.cat([x, x])), r"q_proj holds A \(2, 32\)"),
    (lambda t: _change(t, B, lambda x: x * float("nan")), "q_proj holds NaN or infinity"),
    (lambda t: (t.pop(A), t.pop(B)), "q_proj is planned but has no adapter"),
]


@pytest.mark.parametrize(("damage", "message"), TENSOR_FAULTS)
def test_each_clause_of_the_tensors_is_checked(damage, message, saved):
    folder, plan = saved
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(GuardError, match=message):
        check_saved(folder, plan)


def test_untrained_modules_are_counted_and_missing_files_named(saved):
    folder, plan = saved
    path = folder / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if k == B else v for k, v in load_file(path).items()}, path)
    assert check_saved(folder, plan) == 1
    path.unlink()
    with pytest.raises(GuardError, match="no adapter was saved"):
        check_saved(folder, plan)
