"""The live adapter against autograd, and what is saved of it against plain PEFT."""

import peft
import pytest
import torch

from tests.helpers.dynamic import batch, scatter, start_plan, triplet_model
from tests.helpers.tiny import tiny_model


def test_position_masks_and_gradients_of_the_triplet_form():
    model, triplets, _ = triplet_model()
    module = triplets.modules[0]
    triplets.mask([[True, False, True, True], *triplets.masks[1:]])
    layer = model.get_submodule(f"base_model.model.{module.name}")
    scale = layer.scaling["default"]
    triplets.position.take(0.5)
    assert layer.scaling["default"] == scale / 8, "the layer's own scale carries the cube"
    effective = layer.lora_A["default"].effective_weight()
    q, lam = module.q.detach(), module.a.lambda_r.detach()
    on = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert torch.allclose(effective, q * (lam * on)[:, None])
    seen = torch.randn_like(effective)
    effective.backward(seen)
    assert torch.allclose(module.q.grad, seen * (lam * on)[:, None])
    # Lambda's gradient is the one of the unmasked form: the masked component learns what it would add.
    assert torch.allclose(module.a.lambda_r.grad, (seen * q).sum(1))
    triplets.position.strength = 0.5
    triplets.position.leave()
    assert layer.scaling["default"] == scale
    assert torch.allclose(layer.lora_A["default"].effective_weight(), q * (lam * on)[:, None] / 2)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_saved_adapters_are_plain_lora_and_equal_the_live_model(architecture, tmp_path):
    from dataclasses import replace

    from llamafactory_adaptive.adapter.verify import check_saved

    model, triplets, _ = triplet_model(architecture)
    plan = start_plan(tiny_model(architecture))
    scatter(triplets)
    masks = [[(i + j) % 3 != 0 for j in range(4)] for i in range(len(triplets.modules))]
    masks[4] = [False] * 4
    triplets.mask(masks)
    inputs = batch()
    with torch.no_grad():
        live = model(**inputs).logits

    def loaded(folder):
        fresh = peft.PeftModel.from_pretrained(tiny_model(architecture), folder)
        with torch.no_grad():
            return fresh(**inputs).logits

    model.save_pretrained(tmp_path / "checkpoint")
    check_saved(tmp_path / "checkpoint", plan)
    assert torch.equal(loaded(tmp_path / "checkpoint"), live)
    modules = tuple(replace(m, rank=sum(row)) for m, row in zip(plan.modules, masks, strict=True))
    final_plan = replace(plan, modules=modules)
    triplets.finalize(model, final_plan)
    model.save_pretrained(tmp_path / "final")
    check_saved(tmp_path / "final", final_plan)
    assert (loaded(tmp_path / "final") - live).abs().max() < 1e-5


def test_a_plain_adapter_loads_into_the_live_form(tmp_path):
    model, triplets, _ = triplet_model()
    scatter(triplets)
    model.save_pretrained(tmp_path)
    other, others, _ = triplet_model()
    other.load_adapter(tmp_path, "default", is_trainable=True)
    inputs = batch()
    with torch.no_grad():
        assert torch.allclose(other(**inputs).logits, model(**inputs).logits, atol=1e-6)
    assert (others.modules[0].a.lambda_r == 1).all()


def test_without_lambda_the_live_form_is_plain_lora_from_its_usual_start(tmp_path):
    import peft

    from tests.helpers.tiny import tiny_model

    model, triplets, _ = triplet_model(initial_lambda=None)
    assert not any("lambda" in name for name, _ in model.named_parameters())
    for module in triplets.modules:
        assert (module.p == 0).all()
        bound = module.q.shape[1] ** -0.5
        assert 0.5 * bound < module.q.abs().max() <= bound
    scatter(triplets)
    triplets.mask([[i != 2 for i in range(4)] for _ in triplets.modules])
    with torch.no_grad():
        live = model(**batch()).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(peft.PeftModel.from_pretrained(tiny_model(), tmp_path)(**batch()).logits, live)
