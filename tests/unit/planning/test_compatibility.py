"""A plan that does not fit the model, the budget or the run is refused by key and number."""

import dataclasses

import pytest

from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.methods import get_method, make_method
from llamafactory_adaptive.planning.compatibility import check_plan, check_same_scale, second_stage
from llamafactory_adaptive.planning.earlier_plans import check_resumed_run
from llamafactory_adaptive.planning.planner import start_plan
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.ranks.search_config import GivenRanksConfig, PruningConfig
from tests.helpers.plans import make_plan


SHAPES = [ModuleShape(f"model.layers.{i}.mlp.up_proj", 10, 20) for i in range(2)]
CONFIG = AdaptiveConfig("sensitivity", {"metric": "both"}, "params", 4, 8.0, 1, 16, None,
                        CalibrationConfig(None, 8, 2, 0))  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (SHAPES[:1], "up_proj is in the plan but no target of this model"),
        (
            [*SHAPES, ModuleShape("model.layers.2.mlp.up_proj", 10, 20)],
            "is a target of this model but not in the plan",
        ),
        ([SHAPES[0], ModuleShape(SHAPES[1].name, 10, 21)], "is 10x20 in the plan, 10x21 in the model"),
    ],
)
def test_a_plan_for_another_model_is_refused_with_the_difference(shapes, message):
    with pytest.raises(PlanError, match=message):
        check_plan(make_plan(), shapes, CONFIG, "plan.json")


def test_a_plan_over_the_budget_is_refused_in_the_unit_of_the_budget():
    with pytest.raises(PlanError, match=r"costs 270 parameters, .* is 240: 30 too many; .* lora_rank: 5"):
        check_plan(make_plan((4, 5)), SHAPES, CONFIG, "plan.json")
    ranks = dataclasses.replace(CONFIG, budget_unit="ranks")
    with pytest.raises(PlanError, match=r"costs 9 ranks, .* is 8: 1 too many"):
        check_plan(make_plan((4, 5)), SHAPES, ranks, "plan.json")
    with pytest.raises(PlanError, match="has rank 11, more than its smaller side 10"):
        check_plan(make_plan((11, 1)), SHAPES, dataclasses.replace(CONFIG, lora_rank=9), "plan.json")


def test_an_accepted_plan_takes_order_and_scale_of_the_run():
    shuffled = dataclasses.replace(make_plan(), modules=make_plan().modules[::-1], lora_alpha=99.0)
    accepted = check_plan(shuffled, SHAPES, CONFIG, "plan.json")
    assert [m.name for m in accepted.modules] == [s.name for s in SHAPES]
    assert accepted.scale == 2.0


def test_resuming_asks_for_the_same_run(tmp_path):
    provenance = {"bounds": {"adaptive_min_rank": 1, "adaptive_max_rank": 16},
                  "calibration": {"dataset": None, "samples": 8, "batch_size": 99, "seed": 0}}  # fmt: skip
    plan = make_plan(provenance=provenance)
    check_resumed_run(plan, CONFIG, "ckpt")
    for change, message in (
        ({"lora_alpha": 16.0}, "lora_alpha is 8.0 there and 16.0 here"),
        ({"granularity": "type"}, "adaptive_granularity is module there and type here"),
        ({"max_rank": 9}, "adaptive_max_rank is 16 there and 9 here"),
        ({"calibration": dataclasses.replace(CONFIG.calibration, samples=4)}, "samples is 8 there and 4 here"),
        ({"options": {"metric": "local"}}, "sensitivity_metric is both there and local here"),
    ):
        with pytest.raises(PlanError, match=message):
            check_resumed_run(plan, dataclasses.replace(CONFIG, **change), "ckpt")
    path = tmp_path / "given.json"
    plan.save(path)
    given = dataclasses.replace(CONFIG, method="random", options={}, plan_path=str(path))
    check_resumed_run(plan, given, "ckpt")
    make_plan((4, 4)).save(path)
    with pytest.raises(PlanError, match=r"adaptive_plan is of other ranks there and .*given.json here"):
        check_resumed_run(plan, given, "ckpt")
    edited = make_plan(provenance={**provenance, "adaptive_plan": "mine.json"})
    with pytest.raises(PlanError, match=r"adaptive_plan is mine.json there and None here"):
        check_resumed_run(edited, CONFIG, "ckpt")


def test_a_search_is_resumed_at_the_distance_it_began_with():
    bounds = {"adaptive_min_rank": 1, "adaptive_max_rank": 16}
    # As versions wrote it that knew steps alone.
    course = {"init_rank": 8, "warmup_ratio": 0.1, "final_ratio": 0.3, "interval": 10, "max_overhead": None, "seed": 0}
    plan = make_plan(provenance={"bounds": bounds, "course": course})
    config = dataclasses.replace(CONFIG, search=PruningConfig(8, 0.1, 0.3, 10, None, 0))
    check_resumed_run(plan, config, "ckpt")
    epochs = dataclasses.replace(config, search=PruningConfig(8, 0.1, 0.3, None, None, 0, interval_epochs=0.2))
    with pytest.raises(PlanError, match=r"adaptive_interval_epochs is None there and 0\.2 here"):
        check_resumed_run(plan, epochs, "ckpt")


def test_a_second_stage_is_resumed_in_the_form_it_was_trained_in(tmp_path):
    path = tmp_path / "given.json"
    make_plan().save(path)
    options = dataclasses.asdict(get_method("igu").Options())
    stage = dataclasses.replace(CONFIG, method="igu", options=options, plan_path=str(path), given=GivenRanksConfig(0))
    plain = dataclasses.replace(stage, options={**options, "second_stage": "lora"}, given=None)
    of_lora = make_plan(provenance={"adaptive_plan": str(path)})  # earlier versions trained no other
    of_triplets = make_plan(
        provenance={"adaptive_plan": str(path), "second_stage": second_stage(stage, make_method("igu", options))}
    )
    check_resumed_run(of_lora, plain, "ckpt")
    check_resumed_run(of_triplets, stage, "ckpt")
    check_resumed_run(of_triplets, dataclasses.replace(stage, options={**options, "beta1": 0.5}), "ckpt")
    for plan, config, message in (
        (of_lora, stage, "another run: igu_second_stage is lora there and triplet here; change"),
        (of_triplets, plain, "another run: igu_second_stage is triplet there and lora here; change"),
        (of_triplets, dataclasses.replace(stage, options={**options, "init": "gaussian"}), "igu_init is lora there"),
        (of_triplets, dataclasses.replace(CONFIG, plan_path=str(path)), "adaptive_method is igu there"),
    ):
        with pytest.raises(PlanError, match=message):
            check_resumed_run(plan, config, "ckpt")


def test_a_search_resumes_whatever_is_said_of_a_second_stage():
    """Plans of earlier versions, which had no such key, included."""
    config = dataclasses.replace(CONFIG, method="igu", search=PruningConfig(8, 0.1, 0.7, 2, None, 0),
                                 options=dataclasses.asdict(get_method("igu").Options()))  # fmt: skip
    plan = start_plan(config, SHAPES, {})
    for stage in ("triplet", "lora"):
        stored = {**plan.options, "second_stage": stage}
        check_resumed_run(dataclasses.replace(plan, options=stored), config, "ckpt")


def test_going_on_asks_for_the_same_scale_only():
    check_same_scale(make_plan(), dataclasses.replace(CONFIG, method="random"), "adapter")
    with pytest.raises(PlanError, match=r"lora_rank is 4 there and 8 here.*create_new_adapter: true"):
        check_same_scale(make_plan(), dataclasses.replace(CONFIG, lora_rank=8), "adapter")
