"""Compressed gradients against autograd on the base weights themselves."""

import pytest
import torch
from torch.nn import functional

from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.calibration.gradient_projections import GradientProjections
from llamafactory_adaptive.errors import CalibrationError
from tests.helpers.inputs import targets
from tests.helpers.tiny import rows, tiny_model


def weight_gradients(model, data):
    """Gradients of the mean loss over all answer tokens, row by row: the slow, obvious way."""
    names = targets(model)
    total, tokens = 0.0, 0
    for row in data:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total = total + functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        tokens += int((labels != -100).sum())
    gradients = torch.autograd.grad(total / tokens, [names[name].weight for name in names])
    return dict(zip(names, gradients, strict=True))


def test_rows_are_a_and_its_product_with_the_gradient_of_the_mean_loss():
    model, data = tiny_model(), rows(7)

    def measured(seed):
        return GradientProjections(rank=5, seed=seed)(model, targets(model), make_batches(data, 3, 258))

    found, again, other = measured(3), measured(3), measured(4)
    for name, gradient in weight_gradients(model, data).items():
        a, product = found[name].split(gradient.T.shape, dim=1)
        assert torch.allclose(product, a @ gradient.T, atol=1e-6), name
        assert a.abs().max() <= gradient.shape[1] ** -0.5, "drawn as PEFT draws A"
        assert torch.equal(again[name], found[name])
        assert not torch.equal(other[name], found[name])


def test_rows_without_answers_have_no_gradient():
    model = tiny_model()
    silent = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    with pytest.raises(CalibrationError, match="no calibration token takes a loss"):
        GradientProjections(2, 0)(model, targets(model), make_batches(silent, 1, 258))
