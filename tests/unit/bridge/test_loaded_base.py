"""A base that is measured before it trains: put back as it was loaded, or known not to be."""

import random

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llamafactory_adaptive.bridge.loaded_base import LoadedBase
from llamafactory_adaptive.bridge.random_state import RandomState, random_state_kept
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from tests.helpers.tiny import rows, tiny_model


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def base(model):
    return LoadedBase(model, {}, drew=False)


def everything(model):
    """All that modules hold, tensors and hooks and flags, to be compared by identity."""
    parts = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inner = dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value
            parts[name, key] = inner
    return parts


def same(first, second):
    """Compare without ``==`` of tensors."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(first[key] is second[key] for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
    return first is second or (type(first) in (bool, int, float, str) and first == second)


def test_what_was_bound_anew_is_put_back(model, base):
    before = everything(model)
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda *args: None)
    layer.mlp.up_proj.compute_dtype = torch.bfloat16
    layer.mlp.up_proj.weight_of_old = model.model.norm.weight
    model.model.rotary_emb.inv_freq = torch.ones(4)
    model.model.rotary_emb.attention_scaling = 7.0
    del layer.self_attn.q_proj
    model.train()
    assert base.restore()
    after = everything(model)
    assert after.keys() == before.keys()
    assert all(same(before[key], after[key]) for key in before)


def test_a_measurement_leaves_the_base_as_it_was_loaded(model, base):
    before, versions = everything(model), [p._version for p in model.parameters()]
    modules = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for weighting in ("none", "gradient"):
        InputSecondMoments(weighting)(model, modules, make_batches(rows(4), 2, 258))
        assert base.restore()
    after = everything(model)
    assert after.keys() == before.keys()
    assert all(same(before[key], after[key]) for key in before)
    assert [p._version for p in model.parameters()] == versions


def written(model):
    with torch.no_grad():
        model.lm_head.weight.mul_(1.0)


def moved_buffer(model):
    model.model.rotary_emb.inv_freq.add_(0.0)


def graded(model):
    model.model.norm.weight.grad = torch.zeros(32)


def frozen(model):
    model.lm_head.weight.requires_grad_(False)


def configured(model):
    model.config.use_cache = not model.config.use_cache


def quantised(model):
    model.is_quantized, model.is_loaded_in_8bit = True, True


def spread(model):
    model.hf_device_map = {"model": 0, "lm_head": "disk"}


@pytest.mark.parametrize("change", [written, moved_buffer, graded, frozen, configured])
def test_a_base_that_was_changed_is_not_as_loaded(change, model, base):
    change(model)
    assert not base.restore()


@pytest.mark.parametrize("kind", [quantised, spread])
def test_a_base_whose_modules_hide_state_is_not_trusted(kind, model):
    kind(model)
    assert not LoadedBase(model, {}, drew=False).restore()


def test_one_that_4_bits_hold_on_one_device_is_as_loaded(model):
    model.is_quantized, model.is_loaded_in_4bit, model.hf_device_map = True, True, {"": torch.device("cpu")}
    assert LoadedBase(model, {}, drew=False).restore()


def test_code_of_others_and_weights_drawn_at_random_are_not_trusted(model):
    class Own(LlamaForCausalLM):
        pass

    assert not LoadedBase(model, {}, drew=True).restore()
    assert not LoadedBase(Own(model.config), {}, drew=False).restore()


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: torch.rand(1)], ids=["python", "numpy", "torch"]
)
def test_random_state_is_that_of_before(draw):
    before = RandomState.current()
    with random_state_kept():
        first = float(draw())
        assert not before.is_current()
    assert before.is_current()
    assert float(draw()) == first
