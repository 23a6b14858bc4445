"""Every family of architectures: planned, trained, saved, read by plain PEFT, merged."""

import pytest
import torch
from peft import PeftModel

from llamafactory_adaptive import (
    attach_adapter,
    calibration_batches,
    check_adapter,
    plan_ranks,
    rank_search,
    score_modules,
)
from llamafactory_adaptive.api import targets
from llamafactory_adaptive.errors import AdaptiveConfigError, CalibrationError
from llamafactory_adaptive.ranks.module_names import is_routed_expert
from llamafactory_adaptive.training.gradient_check import GradientCheck
from llamafactory_adaptive.training.run_log import Counters
from tests.helpers.dynamic import batch
from tests.helpers.families import FAMILIES, PACKED_EXPERTS, family_model
from tests.helpers.searches import trainer_of
from tests.helpers.tiny import rows


FAST = ("phi3", "qwen3_moe", "qwen2_vl")  # whose searches are not repeats of others
SEARCHED = [name if name in FAST else pytest.param(name, marks=pytest.mark.repeats) for name in FAMILIES]


def wanted(name):
    """Its image tower reads no token of a text."""
    return ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"] if name == "qwen2_vl" else "all-linear"


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


def check_saved(model, name, folder, plan):
    """What was saved gives the outputs of the live model in plain PEFT, and when merged."""
    live = logits(model)
    assert check_adapter(folder, plan) == 0, "every module was trained"
    assert (live - logits(family_model(name))).abs().max() > 1e-4, "training has an effect"
    loaded = PeftModel.from_pretrained(family_model(name), folder)
    assert torch.allclose(logits(loaded), live, atol=1e-5)
    assert torch.allclose(logits(loaded.merge_and_unload()), live, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_planned_ranks_train_and_are_saved(name, tmp_path):
    base = family_model(name)
    batch_size = 1 if name == "experts_as_modules" else 2  # its experts read tokens of all samples mixed
    scores = score_modules(base, calibration_batches(rows(6), batch_size), target_modules=wanted(name))
    plan = plan_ranks(scores, lora_rank=2)
    assert len(set(plan.ranks().values())) > 1
    model = attach_adapter(base, plan).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for step in range(2):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    check_saved(model, name, tmp_path, plan)


@pytest.mark.parametrize("name", SEARCHED)
def test_ranks_are_found_while_training_and_saved(name, tmp_path):
    search = rank_search(family_model(name), lora_rank=2, interval=2, importance="off", target_modules=wanted(name))
    trainer = trainer_of(search, tmp_path, max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path))
    check_saved(search.model, name, tmp_path, search.finalize(tmp_path))


# -- modules that a batch does not reach -----------------------------------------------------------------------------
def test_a_first_batch_of_text_passes_over_the_image_tower(tmp_path):
    scores = score_modules(family_model("qwen2_vl"), [], method="uniform")
    assert any("visual" in shape.name for shape in scores.shapes)
    model = attach_adapter(family_model("qwen2_vl"), plan_ranks(scores, lora_rank=2)).train()
    check = GradientCheck(Counters(), model)
    model(**batch()).loss.backward()
    check.before_step(model)
    assert all("visual" in name for name in check.waiting)
    search = rank_search(family_model("qwen2_vl"), lora_rank=2, interval=2, importance="off")
    trainer_of(search, tmp_path, max_steps=4).train()
    assert any("visual" in name for name in search.plan.ranks())


# -- experts as modules ----------------------------------------------------------------------------------------------
def test_experts_that_are_modules_have_ranks_of_their_own():
    base, kinds = family_model("experts_as_modules"), ["up_proj", "down_proj"]
    with pytest.raises(
        CalibrationError, match=r"\(a routed expert\?\), so padding cannot be told apart; set batch_size=1"
    ):
        score_modules(base, calibration_batches(rows(6), 2), target_modules=kinds)
    scores = score_modules(base, calibration_batches(rows(6), 1), target_modules=kinds)
    ranks = plan_ranks(scores, lora_rank=2).ranks()
    assert len(ranks) == 2 * 4 * 2
    assert all(is_routed_expert(name) for name in ranks)
    assert len(set(ranks.values())) > 1


# -- experts in one tensor -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.repeats) for n in PACKED_EXPERTS]
)
def test_experts_in_one_tensor_are_named_and_left_out(name, caplog):
    targets._warned_of.clear()
    chosen = targets.find_targets(family_model(name), "all-linear")
    assert chosen
    assert not any(".experts." in full for full in chosen)
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "hold the experts of a layer in one tensor" in line]) == 1
    with pytest.raises(AdaptiveConfigError, match=r"gate_up_proj holds the experts of a layer in one tensor"):
        targets.find_targets(family_model(name), ["q_proj", "gate_up_proj"])
