"""A base model with hooks computes as PEFT does with the adapter, and is left as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llamafactory_adaptive.adapter.component_hooks import first_components_applied
from tests.helpers.tiny import tiny_model


IDS = torch.arange(20).reshape(2, 10)


def test_all_components_are_what_peft_computes_and_none_are_the_base():
    base = tiny_model()
    live = get_peft_model(tiny_model(), LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    factors = {}
    for name, module in live.named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            factors[name.removeprefix("base_model.model.")] = (
                module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach(),
            )  # fmt: skip
    layers = {name: base.get_submodule(name) for name in factors}
    with torch.no_grad():
        alone, expected = base(IDS).logits, live(IDS).logits
        with first_components_applied(layers, factors, dict.fromkeys(factors, 3), 2.0):
            torch.testing.assert_close(base(IDS).logits, expected)
        with first_components_applied(layers, factors, dict.fromkeys(factors, 0), 2.0):
            assert torch.equal(base(IDS).logits, alone)
        assert (expected - alone).abs().max() > 0.01


def test_the_first_components_alone_count_in_the_layers_own_type_and_hooks_go_after_an_error():
    layer = nn.Linear(4, 3, dtype=torch.bfloat16)
    a, b, x = torch.randn(5, 4), torch.randn(3, 5), torch.randn(2, 4, dtype=torch.bfloat16)
    plain = layer(x)
    seen = []

    def fail_within():
        with first_components_applied({"up": layer}, {"up": (a, b)}, {"up": 2}, 0.5):
            seen.append(layer(x))
            raise KeyError

    with pytest.raises(KeyError):
        fail_within()
    [with_two] = seen
    expected = plain.float() + 0.5 * x.float() @ a[:2].T @ b[:, :2].T
    assert with_two.dtype == torch.bfloat16
    torch.testing.assert_close(with_two, expected.bfloat16())
    assert torch.equal(layer(x), plain)
