"""Options of IGU-LoRA: the two variants, plans of earlier versions, and options that others leave without effect."""

from dataclasses import asdict, replace

import pytest

from llamafactory_adaptive import rank_search
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.methods import Orthogonality
from llamafactory_adaptive.methods._igu_options import VARIANTS, IguOptions
from llamafactory_adaptive.methods.igu import Igu
from llamafactory_adaptive.options import with_earlier_values
from llamafactory_adaptive.planning.earlier_plans import with_all_options
from llamafactory_adaptive.ranks.plan import RankPlan
from tests.helpers.tiny import tiny_model


# What the keys were before there were variants.
EARLIER = {"importance": "shrink", "intervals": 20, "probe_interval": 1, "uncertainty": "snr", "lambda_term": "snr",
           "beta1": 0.85, "beta2": 0.85, "epsilon": 1e-6, "orthogonality": "off_diagonal",
           "orthogonality_weight": 1.0}  # fmt: skip


def test_published_has_the_values_from_before_there_were_variants():
    published = asdict(IguOptions("published"))
    assert {key: published[key] for key in EARLIER} == EARLIER
    method = Igu(IguOptions("published"))
    assert method.shrinkage is None
    assert asdict(method.initial_adapter) == {"lambda_value": 0.1, "factors": "gaussian"}
    assert asdict(method.return_rule) == {"hysteresis": 0.0, "used_first": False, "resets_lambda": False}
    assert method.orthogonality == Orthogonality(1.0, "off_diagonal", relative=False)
    assert not method.traits.relative


def test_each_part_of_a_variant_can_be_set_by_itself():
    options = IguOptions("published", init="lora", hysteresis=0.0)
    assert (options.init, options.hysteresis, options.importance) == ("lora", 0.0, "shrink")
    assert IguOptions(orthogonality_weight=0.5).orthogonality_weight == 0.5
    assert IguOptions.complete(asdict(options)) == asdict(options), "what a plan stores is read back unchanged"


@pytest.mark.parametrize(("options", "lasting"), [
    ({"importance": "shrink"}, False),
    ({"importance": "shrink", "mend_strength": True}, True),
    ({"importance": "shrink", "mend_strength": False}, None),
    ({"variant": "published"}, None),
    ({"variant": "published", "mend_strength": True}, True),
    ({"importance": "integrated"}, None),
    ({}, None),
])  # fmt: skip
def test_strength_is_mended_for_good_where_it_is_asked_for(options, lasting):
    shrinkage = Igu(IguOptions(**options)).shrinkage
    assert (None if shrinkage is None else shrinkage.lasting) is lasting


def test_a_corrected_run_of_when_strength_was_always_mended_is_resumed():
    now = asdict(IguOptions())
    plan = RankPlan("igu", {**now, "mend_strength": True}, "params", 2, 4.0, ())
    assert with_all_options(plan).options == now, "without shrinkage the option has no effect"
    shrunk = asdict(IguOptions(importance="shrink", mend_strength=True))
    assert with_all_options(replace(plan, options=shrunk)).options == shrunk, "there it has"


def test_a_plan_from_before_there_were_variants_is_of_a_published_run():
    published = asdict(IguOptions("published", second_stage="lora"))
    assert with_earlier_values(IguOptions, EARLIER) == published
    plan = RankPlan("igu", {**EARLIER, "intervals": 10}, "params", 2, 4.0, ())
    assert with_all_options(plan).options == {**published, "intervals": 10}
    of_tsq = RankPlan("uniform", {}, "params", 2, 4.0, (), provenance={
        "sampling": {"adaptive_method": "tsq", "tsq_subset_ratio": 0.5}})  # fmt: skip
    sampling = with_all_options(of_tsq).provenance["sampling"]
    assert sampling["tsq_subset_ratio"] == 0.5
    assert "tsq_temperature" in sampling
    assert with_all_options(RankPlan("gone", {"x": 1}, "params", 2, 4.0, ())).options == {"x": 1}


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
