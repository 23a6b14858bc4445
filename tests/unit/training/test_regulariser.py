"""The orthogonality penalty against autograd."""

import pytest
import torch

from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.methods import Orthogonality, make_method
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.regulariser import gram_penalty_gradient
from tests.helpers.dynamic import stream, triplet_model


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
@pytest.mark.parametrize("kind", ["P", "Q"])
def test_what_is_not_in_use_can_be_left_out_as_if_it_were_not_there(form, kind):
    x = torch.randn(1, 4, 9, dtype=torch.float64)
    used = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    turned = (lambda x: x.mT) if kind == "P" else (lambda x: x)
    found = turned(gram_penalty_gradient(turned(x), kind, form, used_Mr=used))
    kept = turned(gram_penalty_gradient(turned(x[:, [0, 2]]), kind, form))
    assert torch.allclose(found[:, [0, 2]], kept, rtol=1e-9)
    assert (found[:, [1, 3]] == 0).all()


def test_elalora_regularises_the_components_in_use_and_adalora_all():
    for method, held_back in ((make_method("elalora", {}), True), (make_method("adalora", {}), False)):
        _, triplets, components = triplet_model()
        triplets.mask([[True, *[False] * (len(row) - 1)] for row in triplets.masks])
        for module in triplets.modules:
            for parameter in module.parameters().values():
                parameter.grad = torch.zeros_like(parameter)
        components.arrival.done = True
        components.update(None, method.orthogonality)
        for module in triplets.modules:
            assert bool(module.q.grad[0].any())
            assert bool(module.p.grad[:, 0].any())
            assert (bool(module.q.grad[1:].any()), bool(module.p.grad[:, 1:].any())) == (not held_back, not held_back)


@pytest.mark.parametrize("form", ["off_diagonal", "identity"])
def test_the_regulariser_is_added_to_the_training_gradient_as_its_definition_says(form):
    _, triplets, components = triplet_model()
    for module in triplets.modules:
        for parameter in module.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
    components.arrival.done = True  # the gradient of training is zero here
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


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_a_relative_regulariser_has_its_share_of_the_gradient_whatever_the_scale(loss_scale):
    _, triplets, _ = triplet_model()
    components = Components(triplets, UnpartitionedEngine(lambda: loss_scale))
    next(stream(triplets, 1))
    for parameter in components.parameters:
        parameter.grad.mul_(loss_scale)
    before = {block.name: torch.cat([p.grad.reshape(-1).clone() for p in block.parameters])
              for block in components.blocks}  # fmt: skip
    components.update(None, Orthogonality(0.25, "off_diagonal", relative=True))
    for block in components.blocks:
        added = torch.cat([p.grad.reshape(-1) for p in block.parameters]) - before[block.name]
        share = 0.0 if block.kind == "lambda" else 0.25
        assert float(added.norm() / before[block.name].norm()) == pytest.approx(share, rel=1e-4)
        if block.kind == "Q":
            assert torch.allclose(gram_direction(block), added / added.norm(), atol=1e-5)


def gram_direction(block):
    """Direction of the gradient of the sum of the off-diagonal norms, by autograd."""
    copies = [p.detach().clone().requires_grad_() for p in block.parameters]
    grams = [x @ x.T for x in copies]
    sum((gram - torch.diag(gram.diagonal())).norm() for gram in grams).backward()
    flat = torch.cat([x.grad.reshape(-1) for x in copies])
    return flat / flat.norm()
