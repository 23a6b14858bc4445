"""PEFT's look-up of names, resolved once: the same adapter as PEFT's own, with few looks."""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraModel
from peft.utils import other
from torch import nn

from llamafactory_adaptive.adapter.lora import contract_arguments
from llamafactory_adaptive.adapter.name_lookup import MANY, look_names_up_once


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj, self.other = (nn.Linear(2, 3, bias=False) for _ in range(3))


def base(layers):
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(layers))})})


def ranks_of(layers):
    names = [f"model.layers.{index}.{kind}" for index in range(layers) for kind in ("up_proj", "down_proj")]
    return {name: 1 + index % 3 for index, name in enumerate(names) if index % 5}  # some modules have no adapter


@pytest.fixture
def as_peft(monkeypatch):
    """PEFT as it is without us, whatever ran before in this process."""
    own = getattr(LoraModel.inject_adapter, "__wrapped__", LoraModel.inject_adapter)
    monkeypatch.setattr(LoraModel, "inject_adapter", own)
    return monkeypatch


def built(config, layers):
    """Rank and scale of every adapted module, and the targets that the config names afterwards."""
    model = get_peft_model(base(layers), LoraConfig(**config))
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in model.named_modules()
             if isinstance(layer, peft.tuners.lora.LoraLayer)}  # fmt: skip
    return found, model


CONFIGS = {
    "a plan": contract_arguments(ranks_of(60), 2.0),
    "ends of names, the first that applies": {
        "r": 4, "target_modules": ["up_proj", "layers.3.down_proj", *ranks_of(60)],
        "rank_pattern": {"layers.1.up_proj": 2, "^model.layers.7.up_proj": 3, "up_proj": 5, **ranks_of(60)},
        "alpha_pattern": {"down_proj": 3.0}, "lora_alpha": 8,
    },
    "expressions": {
        "r": 4, "target_modules": list(ranks_of(60)), "rank_pattern": {r"layers\.[0-9]\..*": 2, **ranks_of(60)},
    },
    "a target expression": {"r": 4, "target_modules": ".*up_proj", "rank_pattern": ranks_of(60)},
    "exclusions": {"r": 4, "target_modules": list(ranks_of(60)), "exclude_modules": ["layers.4.up_proj"],
                   "rank_pattern": ranks_of(60)},
    "fully trained modules": {**contract_arguments(ranks_of(60), 2.0), "modules_to_save": ["other"]},
}  # fmt: skip


@pytest.mark.parametrize("name", list(CONFIGS))
def test_adapters_are_those_that_peft_builds_by_itself(name, as_peft):
    config = CONFIGS[name]
    expected, _ = built(config, 60)
    look_names_up_once()
    found, model = built(config, 60)
    assert found == expected
    assert len(set(found.values())) > 1 or name == "exclusions"
    kept = model.peft_config["default"]
    given = config["target_modules"]
    assert kept.target_modules == (set(given) if isinstance(given, list) else given), "not condensed to ends of names"
    assert dict(kept.rank_pattern) == config["rank_pattern"]
    assert type(kept.rank_pattern) is dict


def looks(as_peft, action):
    """Expressions that PEFT tries, and ends of names, while ``action`` runs."""
    seen = []

    class Counting:
        match = staticmethod(lambda *given: seen.append(given) or other_re.match(*given))

        def __getattr__(self, name):
            return getattr(other_re, name)

    other_re = other.re
    with as_peft.context() as patched:
        patched.setattr(other, "re", Counting())
        patched.setattr(tuners_utils, "_find_minimal_target_modules", lambda *given: pytest.fail("ends are sought"))
        action()
    return len(seen)


def test_building_and_loading_tries_no_expression_per_pair_of_modules(as_peft, tmp_path):
    look_names_up_once()
    for layers in (50, 100):
        model = []
        config = contract_arguments(ranks_of(layers), 2.0)
        assert len(config["target_modules"]) >= MANY
        assert looks(as_peft, lambda: model.append(built(config, layers)[1])) == 0  # noqa: B023
        model[0].save_pretrained(tmp_path / str(layers))
        loaded = []
        folder = tmp_path / str(layers)
        assert looks(as_peft, lambda: loaded.append(peft.PeftModel.from_pretrained(base(layers), folder))) == 0  # noqa: B023
        tensors = loaded[0].state_dict()
        factors = {key: value for key, value in model[0].state_dict().items() if ".lora_" in key}
        assert all(torch.equal(tensors[key], value) for key, value in factors.items())


def test_the_config_is_restored_when_peft_refuses_the_model(as_peft):
    look_names_up_once()
    config = LoraConfig(**contract_arguments(ranks_of(60), 2.0))
    before = dict(config.rank_pattern), set(config.target_modules)
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(nn.ModuleDict({"lin": nn.Linear(2, 2)}), config)
    assert (config.rank_pattern, config.target_modules) == before


def test_small_configs_are_left_to_peft(as_peft):
    look_names_up_once()
    config = contract_arguments(dict(list(ranks_of(60).items())[:10]), 2.0)
    assert looks(as_peft, lambda: get_peft_model(base(10), LoraConfig(**config))) > 0
