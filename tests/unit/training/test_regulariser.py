"""The orthogonality penalty against autograd."""

import pytest
import torch

from llamafactory_adaptive.methods import Orthogonality
from llamafactory_adaptive.training.regulariser import gram_penalty_gradient
from tests.helpers.dynamic import triplet_model


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
