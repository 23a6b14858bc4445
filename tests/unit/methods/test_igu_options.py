"""Options of IGU-LoRA that others leave without effect, and those that they do not."""

import pytest

from llamafactory_adaptive import rank_search
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.methods._igu_options import VARIANTS, IguOptions
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"descale": False, "mend_strength": False, "intervals": 10}, ["mend_strength", "descale", "intervals"]),
        ({"importance": "integrated", "intervals": 10, "descale": False, "probe_interval": 2}, []),
        ({"importance": "integrated", "mend_strength": False}, ["mend_strength"]),
        ({"importance": "shrink", "intervals": 10, "descale": False, "probe_interval": 2}, ["probe_interval"]),
        ({"epsilon": 1e-3, "epsilon_scale": "absolute"}, ["epsilon", "epsilon_scale"]),
        ({"uncertainty": "snr", "epsilon": 1e-3, "epsilon_scale": "absolute"}, []),
        ({"uncertainty": "mean", "beta1": 0.9, "beta2": 0.9}, ["beta2"]),
        ({"beta2": 0.9}, ["beta2"]),
        ({"uncertainty": "product", "beta2": 0.9}, []),
        ({"orthogonality": "identity", "orthogonality_scale": "absolute"}, ["orthogonality", "orthogonality_scale"]),
        ({"orthogonality": "identity", "orthogonality_weight": 0.1}, []),
        ({"orthogonality": "none"}, []),
        ({"orthogonality": "none", "orthogonality_weight": 0.1}, ["orthogonality_weight"]),
        ({"variant": "published", "importance": "off", "uncertainty": "product", "orthogonality": "none"}, []),
        ({"variant": "published", "importance": "off", "mend_strength": True}, ["mend_strength"]),
        ({"variant": "published", "orthogonality_weight": 0.0, "orthogonality": "identity"}, ["orthogonality"]),
        *(({"variant": variant, **parts}, []) for variant, parts in VARIANTS.items()),
    ],
    ids=str,
)
def test_options_without_effect_are_named(options, keys):
    problems = IguOptions(**options).check()
    assert [problem.key for problem in problems] == [f"igu_{key}" for key in keys]
    for problem in problems:  # what is advised gives the option its effect
        key, _, value = problem.suggestion.rpartition(", or ")[2].partition(": ")
        mended = {**options, key.removeprefix("igu_"): float(value) if value[0].isdigit() else value}
        assert problem.key not in [other.key for other in IguOptions(**mended).check()]


def test_an_option_without_effect_is_refused_in_words():
    message = r"mend_strength: False is invalid: only importance='shrink' .*; try leaving mend_strength out"
    with pytest.raises(AdaptiveConfigError, match=message):
        rank_search(tiny_model(), "igu", lora_rank=4, mend_strength=False)
