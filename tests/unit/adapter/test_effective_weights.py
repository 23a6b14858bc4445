"""Weights that are computed for all modules at once, against modules that compute their own."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.training.components import Components
from llamafactory_adaptive.training.path_probe import Prober
from tests.helpers.dynamic import batch, scatter, triplet_model


MASKS = [[(index + module) % 3 != 0 for index in range(4)] for module in range(14)]


def twins(**more):
    """The same model twice; modules of the first compute their own weights, with autograd through their gates."""
    pair = []
    for shared in (False, True):
        model, triplets, _ = triplet_model(**more)
        scatter(triplets)
        triplets.mask(MASKS)
        if shared:
            triplets.share_weights(model)
        pair.append((model, triplets))
    return pair


def gradients(triplets):
    return [p.grad for module in triplets.modules for p in module.parameters().values()]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["whole graph", "reentrant", "not reentrant"])
@pytest.mark.parametrize("initial_lambda", [0.1, None], ids=["lambda", "plain"])
def test_gradients_are_those_of_autograd_over_micro_batches_at_several_positions(initial_lambda, checkpointing):
    found = []
    for model, triplets in twins(initial_lambda=initial_lambda):
        model.train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        for micro_batch, position in enumerate((0.5, 1.0, 0.8)):
            triplets.position.take(position)
            model(**batch(micro_batch)).loss.backward()
        triplets.settle_gradients()
        found.append(gradients(triplets))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found, strict=True))
    assert all(bool((value != 0).any()) for value in found[0])


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("initial_lambda", [0.1, None], ids=["lambda", "plain"])
def test_outputs_are_bit_for_bit_those_of_modules_that_compute_their_own(initial_lambda, strength):
    outputs = []
    for model, triplets in twins(initial_lambda=initial_lambda):
        triplets.position.strength = strength
        triplets.position.leave()
        with torch.no_grad():
            outputs.append(model(**batch()).logits)
    assert torch.equal(*outputs)


def test_a_pass_sees_what_the_factors_are_now_however_it_begins():
    _, (model, triplets) = twins()
    inputs = batch()
    entries = (model, model.base_model, model.get_base_model())
    with torch.no_grad():
        for number, entry in enumerate(entries):
            triplets.modules[number].a.lambda_r.data.mul_(3.0)  # an edit that leaves no trace in the version of lambda
            seen = entry(**inputs).logits
            triplets.effective.forget()
            assert torch.equal(seen, model(**inputs).logits)
        layer = triplets.modules[0].a
        layer.weight.data.mul_(2.0)
        triplets.position.leave()
        own = layer.weight * (layer.lambda_r * layer.mask_r)[:, None]
        assert torch.equal(layer.effective_weight(), own), "by itself"


def test_extra_passes_find_the_same_gradients():
    found = []
    for model, triplets in twins():
        prober = Prober(model, Components(triplets, UnpartitionedEngine()), seed=0)
        prober.inputs = batch()
        found.append([value for row in prober.gradients([(0.5, 1.0), (1.0, 0.5)]) for value in row])
        assert all(module.q.grad is None for module in triplets.modules)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found, strict=True))


def test_without_gates_the_layers_read_their_own_weights():
    model, triplets, _ = triplet_model(initial_lambda=None)
    triplets.share_weights(model)
    model(**batch()).loss.backward()
    assert all(module.a.effective_weight() is module.a.weight for module in triplets.modules)
    before = copy.deepcopy(gradients(triplets))
    triplets.settle_gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(triplets), strict=True))


@pytest.fixture
def process_group():
    """A group of this process alone, in which DDP waits for every gradient as it does with others."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_leaves_lambda_to_the_search(process_group):
    found = []
    for (model, triplets), wrap in zip(twins(), (lambda model: model, DistributedDataParallel), strict=True):
        model.train()
        wrapped = wrap(model)
        for step in range(2):  # in the second, DDP says what it has not got in the first
            model.zero_grad()
            wrapped(**batch(step)).loss.backward()
            triplets.settle_gradients()
        found.append(gradients(triplets))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found, strict=True))
