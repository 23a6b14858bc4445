"""The live adapter against autograd, and what is saved of it against plain PEFT."""

import peft
import pytest
import torch
from dynamic import batch, scatter, start_plan, stream, triplet_model
from tiny import tiny_model

from llamafactory_adaptive.methods import Orthogonality
from llamafactory_adaptive.training.regulariser import gram_penalty_gradient


@pytest.mark.parametrize("form", ["off_diagonal", "identity"])
def test_the_regularisers_gradient_is_autograds(form):
    x = torch.randn(5, 4, 9, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(4, dtype=torch.float64)
    gram = x @ x.mT
    counted = gram * (1 - eye) if form == "off_diagonal" else gram - eye
    counted.flatten(1).norm(dim=1).sum().backward()
    assert torch.allclose(gram_penalty_gradient(x.detach(), "Q", form), x.grad, rtol=1e-9)
    assert torch.allclose(gram_penalty_gradient(x.detach().mT, "P", form), x.grad.mT, rtol=1e-9)
    orthonormal = eye[None]
    assert (gram_penalty_gradient(orthonormal, "Q", form) == 0).all()


@pytest.mark.parametrize("form", ["off_diagonal", "identity"])
def test_the_regulariser_is_added_to_the_training_gradient_as_its_definition_says(form):
    _, triplets, components = triplet_model()
    for module in triplets.modules:
        for parameter in module.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
    components.update(None, Orthogonality(3.0, form))
    norms = []
    for module in triplets.modules:
        for gram in (module.p.T @ module.p, module.q @ module.q.T):
            eye = torch.eye(len(gram))
            norms.append((gram * (1 - eye) if form == "off_diagonal" else gram - eye).norm())
    parameters = [p for module in triplets.modules for p in (module.p, module.q)]
    expected = torch.autograd.grad(3.0 * sum(norms) / len(norms), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-8)


def test_position_masks_and_gradients_of_the_triplet_form():
    model, triplets, _ = triplet_model()
    module = triplets.modules[0]
    triplets.mask([[True, False, True, True], *triplets.masks[1:]])
    triplets.position.value = 0.5
    layer = model.get_submodule(f"base_model.model.{module.name}")
    effective = layer.lora_A["default"].effective_weight()
    q, lam = module.q.detach(), module.a.lambda_r.detach()
    on = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert torch.allclose(effective, q * (lam * on)[:, None] / 8)
    seen = torch.randn_like(effective)
    effective.backward(seen)
    assert torch.allclose(module.q.grad, seen * (lam * on)[:, None] / 8)
    # Lambda's gradient is the one of the unmasked form: the masked component learns what it would add.
    assert torch.allclose(module.a.lambda_r.grad, (seen * q).sum(1) / 8)


def test_what_is_only_observed_does_not_train():
    _, triplets, components = triplet_model()
    next(stream(triplets, 1))
    triplets.mask([[True, False, True, True], *triplets.masks[1:]])
    before = triplets.modules[0].a.lambda_r.grad.clone()
    components.update(None, None)
    assert triplets.modules[0].a.lambda_r.grad.tolist() == (before * torch.tensor([1.0, 0, 1, 1])).tolist()


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
    found = replace(plan, modules=modules)
    triplets.finalize(model, found)
    model.save_pretrained(tmp_path / "final")
    check_saved(tmp_path / "final", found)
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
