"""Moments of single samples' gradients, taken while a batch trains, against one backward pass per sample."""

import pytest
import torch

from llamafactory_adaptive.adapter.lora import live_factors
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.sampling.sample_moments import SampleMoments
from tests.helpers.dynamic import scatter, triplet_model
from tests.helpers.samples import DATA, inputs
from tests.helpers.tiny import ARCHITECTURES


def masked_model(architecture="llama"):
    """A tiny model whose adapter matters, with a mask that is not the same in all modules."""
    model, triplets, _ = triplet_model(architecture, initial_lambda=None)
    scatter(triplets)
    triplets.mask([[(i + j) % 3 != 0 for j in range(4)] for i in range(len(triplets.modules))])
    return model.eval(), [p for module in triplets.modules for p in module.parameters().values()]


def step_gradients(model, parameters, tokens, groups):
    """Gradients of each group of rows, of a loss that is a mean over the tokens of all."""
    found = []
    for group in groups:
        model.zero_grad()
        batch = inputs(group)
        share = int((batch["labels"][:, 1:] != -100).sum()) / tokens
        (model(**batch).loss * share).backward()
        found.append([p.grad.clone() for p in parameters])
    return found


def tokens_of(data):
    return sum(sum(label != -100 for label in row["labels"][1:]) for row in data)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_moments_are_those_of_one_backward_pass_per_sample(architecture, order):
    model, parameters = masked_model(architecture)
    tokens = tokens_of(DATA)
    single = step_gradients(model, parameters, tokens, [[row] for row in DATA])
    scale = 1 if order == 1 else len(DATA)
    expected = [scale * sum(g.abs() ** order for g in column) for column in zip(*single, strict=True)]
    moments = SampleMoments(live_factors(model), order)
    moments.begin()
    whole = step_gradients(model, parameters, tokens, [DATA[:4], DATA[4:6], DATA[6:]])  # micro-batches of any sizes
    for parameter, wanted in zip(parameters, expected, strict=True):
        assert torch.allclose(moments.take(parameter), wanted, rtol=1e-4, atol=1e-9)
    for column, one in zip(zip(*whole, strict=True), zip(*single, strict=True), strict=True):
        assert torch.allclose(sum(column), sum(one), rtol=1e-4, atol=1e-7), "the training gradient is not touched"


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_count_once(reentrant):
    model, parameters = masked_model()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        moments = SampleMoments(live_factors(model), 1)
        moments.begin()
        model(**inputs(DATA[:3])).loss.backward()
        found.append([moments.take(p) for p in parameters])
        moments.active = False
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-9) for a, b in zip(*found, strict=True))


def test_opposed_samples_cancel_in_the_step_and_not_over_samples():
    """``E|w g| >= |w E g|`` per element, with equality where all samples agree."""
    model, parameters = masked_model()
    moments = SampleMoments(live_factors(model), 1)
    for data, equal in (([DATA[0]] * 3, True), (DATA[:3], False)):
        moments.begin()
        model.zero_grad()
        model(**inputs(data)).loss.backward()
        over = torch.cat([moments.take(p).flatten() for p in parameters])
        step = torch.cat([p.grad.abs().flatten() for p in parameters])
        assert (over >= step - 1e-7).all()
        assert torch.allclose(over, step, rtol=1e-3, atol=1e-7) is equal


def test_passes_outside_a_step_are_not_seen():
    model, parameters = masked_model()
    moments = SampleMoments(live_factors(model), 1)
    model(**inputs(DATA[:2])).loss.backward()
    assert moments.take(parameters[0]) is None
    moments.begin()
    with torch.no_grad():
        model(**inputs(DATA[:2]))
    assert moments.take(parameters[0]) is None
    assert moments.samples == 0


def test_inputs_that_are_no_sequences_of_samples_are_named():
    a, b = torch.nn.Linear(4, 2), torch.nn.Linear(2, 4)
    moments = SampleMoments({"experts.0.up_proj": (a, b)}, 1)
    moments.begin()
    with pytest.raises(GuardError, match=r"experts\.0\.up_proj reads \(5, 4\), no .* tsq_sensitivity_over: step"):
        a(torch.ones(5, 4))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "loss_scale", "error"), [(torch.bfloat16, 1.0, 0.05), (torch.float16, 4096.0, 0.01)]
)
def test_moments_in_half_precision_are_those_in_full_whatever_the_loss_scale(dtype, loss_scale, error, order):
    """The square of a scaled gradient is out of the range of fp16."""
    generator = torch.Generator().manual_seed(0)
    x, pull = (torch.randn(3, 5, width, generator=generator) for width in (16, 12))

    def moments_of(kind, scale):
        torch.manual_seed(1)
        factors = torch.nn.Linear(16, 4, bias=False), torch.nn.Linear(4, 12, bias=False)
        a, b = (factor.to(kind) for factor in factors)
        moments = SampleMoments({"m": (a, b)}, order)
        moments.begin()
        (b(a(x.to(kind))) * pull.to(kind) * scale).float().sum().backward()
        return [moments.take(factor.weight) / scale**order for factor in (a, b)]

    for half, full in zip(moments_of(dtype, loss_scale), moments_of(torch.float32, 1.0), strict=True):
        assert half.dtype == torch.float32
        assert float((half - full).norm() / full.norm()) < error
