"""Settings that a start computed from data cannot go with; the same checks on a whole YAML: test_wrong_yaml."""

import pytest

from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.init_checks import check_init
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.options import check_fields


def problems(own_start=False, **flat):
    common, faults = check_fields(AdaptiveArguments, "", flat)
    return [str(AdaptiveConfigError([problem])) for problem in faults + check_init(flat, common, "igu", own_start)]


def zero(stage):
    return {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adaptive_init": "evaa"}, "adaptive_init: 'evaa' is invalid: must be one of default, eva, gora; try "
         "adaptive_init: eva"),
        ({"adaptive_init": "gora", "deepspeed": zero(3)}, "adaptive_init: 'gora' is invalid: under ZeRO-3 no process "
         "holds a whole factor that could be set before training; try ZeRO-2, or adaptive_init: default"),
        ({"adaptive_init": "eva", "adapter_name_or_path": "x"}, "adaptive_init: 'eva' is invalid: the adapter of "
         "adapter_name_or_path is gone on with, and its factors are trained already; try create_new_adapter: true, or "
         "adaptive_init: default"),
        ({"adaptive_init_gamma": 0.1}, "adaptive_init_gamma: 0.1 is invalid: it is read with adaptive_init: gora "
         "alone; try leaving it out, or adaptive_init: gora"),
    ],
)  # fmt: skip
def test_one_wrong_setting_is_one_clear_message(given, said):
    assert problems(**given) == [said]


@pytest.mark.parametrize(
    "given",
    [
        {"deepspeed": zero(3)},
        {"adaptive_init": "default", "deepspeed": zero(3), "own_start": True},
        {"adaptive_init": "eva", "deepspeed": zero(2)},
        {"adaptive_init": "eva", "fsdp": "full_shard"},
        {"adaptive_init": "gora", "fsdp": "full_shard", "fsdp_config": {"version": 2}},
        {"adaptive_init": "eva", "adapter_name_or_path": "x", "create_new_adapter": True},
        {"adaptive_init": "gora", "adaptive_init_gamma": 0.0, "quantization_bit": 4},
    ],
)
def test_what_works_is_not_refused(given):
    assert problems(**given) == []


def test_a_launcher_that_brings_zero_3_is_seen(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    [said] = problems(adaptive_init="eva")
    assert said.startswith("adaptive_init: 'eva' is invalid: under ZeRO-3")
