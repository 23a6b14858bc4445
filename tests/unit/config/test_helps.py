"""The help of keys that only some methods read names these methods, and no other."""

import re
from dataclasses import fields

from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.methods import get_method, make_method, methods


def methods_named(key):
    (text,) = (field.metadata["help"] for field in fields(AdaptiveArguments) if field.name == key)
    (sentence, *_) = text.split(". ")
    return {name for name in methods() if re.search(rf"\b{name}\b", sentence)}


def test_the_start_above_the_budget_is_that_of_all_methods_that_prune():
    pruning = {name for name in methods() if make_method(name, {}).traits.strategy == "prune"}
    assert methods_named("adaptive_init_rank") == pruning


def test_extra_passes_are_those_of_igu():
    def probes(name):
        options = {field.name for field in fields(get_method(name).Options)}
        return any(
            make_method(name, {"importance": value} if "importance" in options else {}).traits.probes
            for value in ("off", "integrated")
        )

    (text,) = (field.metadata["help"] for field in fields(AdaptiveArguments) if field.name == "adaptive_max_overhead")
    assert [name for name in methods() if probes(name)] == ["igu"]
    assert "igu_importance: integrated" in text
