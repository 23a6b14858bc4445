"""AdaLoRA's scale: that of PEFT's own AdaLoRA, in the live adapter and in all that is made of it."""

import dataclasses
import json

import pytest
import torch
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

from llamafactory_adaptive import rank_search
from llamafactory_adaptive.config.placement import Placement
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.planning.compatibility import check_plan, check_same_scale, check_trained_plan
from llamafactory_adaptive.planning.earlier_plans import check_resumed_run
from llamafactory_adaptive.planning.planner import start_plan
from llamafactory_adaptive.planning.start_message import start_message
from llamafactory_adaptive.ranks.plan import ModuleShape, load_plan, parse_plan
from llamafactory_adaptive.ranks.search_config import PruningConfig
from tests.helpers.searches import trainer_of
from tests.helpers.tiny import tiny_model


SHAPES = [ModuleShape(f"model.layers.{i}.mlp.up_proj", 16, 16) for i in range(2)]
SEARCH = PruningConfig(6, 0.1, 0.3, 2, None, 0)
COMMON = {"adaptive_budget_unit": "params", "adaptive_min_rank": 1, "adaptive_plan": None,
          "adaptive_granularity": "module", "adaptive_max_nonfinite_steps": 3, "adaptive_init": "default",
          "adaptive_init_gamma": 0.05, **{f"adaptive_calibration_{name}": value
                                          for name, value in dataclasses.asdict(Placement()).items()},
          "adaptive_best_model_from": "final"}  # fmt: skip


def configured(scale="init_rank", alpha=16.0, search=SEARCH, method="adalora"):
    options = {"beta1": 0.85, "beta2": 0.85, "orthogonality_weight": 0.5, "scale": scale}
    budget, calibration = (4, alpha, 16), CalibrationConfig(None, 0, 0, 0)
    return AdaptiveConfig.from_checked(COMMON, method, options, budget, calibration, search, scale == "init_rank")


def found():
    """Return a plan within the budget, as a search of AdaLoRA ends with one."""
    start = start_plan(configured(), SHAPES, {})
    return dataclasses.replace(start, modules=tuple(dataclasses.replace(part, rank=4) for part in start.modules))


@pytest.mark.parametrize(("scale", "divisor"), [("init_rank", 6), ("lora_rank", 4)])
def test_the_live_layers_compute_what_pefts_own_do_at_the_start(scale, divisor, tmp_path):
    search = rank_search(tiny_model(), "adalora", lora_rank=4, lora_alpha=7, init_rank=6, scale=scale)
    trainer_of(search, tmp_path)  # turns the adapter into triplets
    triplets, generator = search.callback.bound.search.triplets, torch.Generator().manual_seed(0)
    layers = dict(search.model.base_model.model.named_modules())
    for triplet in triplets.modules:
        layer = layers[triplet.name]
        assert not triplet.a.lambda_r.any(), "lambda starts at zero"
        triplet.a.lambda_r.data.normal_(generator=generator)
        base = nn.Linear(layer.in_features, layer.out_features, bias=False)
        base.weight.data.copy_(layer.base_layer.weight)
        theirs = SVDLinear(base, "default", r=6, lora_alpha=7)
        for name, value in (("A", triplet.q), ("B", triplet.p), ("E", triplet.a.lambda_r[:, None])):
            getattr(theirs, f"lora_{name}")["default"].data.copy_(value)
        x = torch.randn(5, layer.in_features, generator=generator)
        with torch.no_grad():
            ours, their_update = layer(x) - layer.base_layer(x), theirs(x) - base(x)
        assert torch.allclose(ours, their_update * 6 / divisor, rtol=1e-4, atol=1e-6)
        assert ours.abs().max() > 1e-3


def test_what_is_saved_has_the_scale_that_was_trained(tmp_path):
    search = rank_search(tiny_model(), "adalora", lora_rank=2, lora_alpha=7, init_rank=3, interval=2)
    trainer = trainer_of(search, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path))
    plan = search.finalize(tmp_path)  # compares the saved adapter with the plan
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert plan.scale == saved["lora_alpha"] / saved["r"] == pytest.approx(7 / 3)
    for told in (plan, load_plan(tmp_path / "checkpoint-2" / "adaptive_rank_plan.json")):
        assert told.provenance["asked_lora_alpha"] == 7


def test_a_run_goes_on_under_its_own_settings_and_another_alpha_is_named_as_it_was_written():
    plan = start_plan(configured(), SHAPES, {"base_model": "a"})
    assert (plan.lora_alpha, plan.scale) == (pytest.approx(16 * 4 / 6), pytest.approx(16 / 6))
    check_resumed_run(plan, configured(), "checkpoint-2")
    with pytest.raises(PlanError, match=r"run: lora_alpha is 16.0 there and 8.0 here; change them back"):
        check_resumed_run(plan, configured(alpha=8.0), "checkpoint-2")
    with pytest.raises(PlanError, match=r"run: adalora_scale is init_rank there and lora_rank here; change"):
        check_resumed_run(plan, configured("lora_rank"), "checkpoint-2")


def test_a_run_from_before_the_option_is_resumed_with_the_scale_it_had():
    plan = start_plan(configured("lora_rank"), SHAPES, {"base_model": "a"})
    earlier = dataclasses.replace(plan, options={key: plan.options[key] for key in plan.options if key != "scale"})
    check_resumed_run(earlier, configured("lora_rank"), "checkpoint-2")
    with pytest.raises(PlanError, match=r"run: adalora_scale is lora_rank there and init_rank here; change"):
        check_resumed_run(earlier, configured(), "checkpoint-2")


def test_a_plan_whose_alpha_is_no_number_is_refused():
    document = start_plan(configured(), SHAPES, {}).to_json()
    assert parse_plan(document, "plan.json").provenance["asked_lora_alpha"] == 16
    document["provenance"]["asked_lora_alpha"] = "much"
    with pytest.raises(PlanError, match="asked_lora_alpha"):
        parse_plan(document, "plan.json")


@pytest.mark.parametrize(("written", "noted"), [(16.0, 16.0), (16.0 * 4 / 6, None)])
def test_going_on_with_an_adapter_keeps_the_scale_that_it_trained_with(written, noted):
    """Alpha 16 over rank 6 is 10.67 over 4, which no YAML can hold: the alpha that its run was given will do."""
    plan = found()
    fixed = dataclasses.replace(configured(search=None, method="uniform"), lora_alpha=written)
    check_same_scale(plan, fixed, "adapter")
    continued = check_trained_plan(plan, SHAPES, fixed, "adapter")
    assert (continued.scale, continued.provenance.get("asked_lora_alpha")) == (pytest.approx(16 / 6), noted)
    resumed = check_trained_plan(continued, SHAPES, fixed, "checkpoint-2")
    assert resumed == continued
    with pytest.raises(PlanError, match=r"whose lora_alpha 16.0 was divided by the rank that its run started at, "
                                        r"belongs to another run: lora_alpha is 16.0 there and 8.0 here"):  # fmt: skip
        check_same_scale(plan, dataclasses.replace(fixed, lora_alpha=8.0), "adapter")


def test_another_run_on_the_ranks_has_its_own_alpha():
    config = dataclasses.replace(configured(), search=None, asked_alpha=None)
    for alpha in (5.0, 16.0):
        given = check_plan(found(), SHAPES, dataclasses.replace(config, lora_alpha=alpha), "plan.json")
        assert (given.lora_alpha, given.provenance.get("asked_lora_alpha")) == (alpha, None)


def test_a_run_says_how_strong_its_adapter_is():
    said = start_message(configured(alpha=12.0))
    assert said.endswith("as strong as lora_alpha 8 over lora_rank 4")
    assert "lora_alpha 12 is divided by the rank it starts from" in said
    assert "lora_alpha" not in start_message(configured("lora_rank"))
