"""Settings that a comparison refuses, and those that it changes, before anything runs."""

from types import SimpleNamespace

import pytest

from llamafactory_adaptive.bridge.arguments import our_keys
from llamafactory_adaptive.bridge.comparison_checks import (
    check_arm,
    comparison_problems,
    gpu_kinds,
    measured_before_training,
    visible_devices,
    warmup_problems,
    without_training_set,
)
from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.comparison.arms import (
    GIVEN,
    GridPoint,
    built_in_arms,
    choose_arms,
    parse_arm,
    run_settings,
    with_lowest_ranks,
)
from llamafactory_adaptive.errors import AdaptiveConfigError
from tests.helpers.benchmarks import import_benchmarks
from tests.helpers.plans import make_plan
from tests.helpers.tiny import settings


WORTH_IT = import_benchmarks("worth_it")["worth_it"]
SETS = {"dataset": "a,b", "eval_dataset": "c"}


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"stage": "pt"}, "stage"),
        ({"stage": "dpo"}, "stage"),
        ({"finetuning_type": "full"}, "finetuning_type"),
        ({"finetuning_type": "oft"}, "finetuning_type"),
        ({"packing": True}, "packing"),
        ({"fsdp": "full_shard"}, "fsdp"),
        ({"tokenized_path": "x"}, "tokenized_path"),
        ({"adaptive_calibration_dataset": "a"}, "adaptive_calibration_dataset"),
        ({"adaptive_calibration_dataset": "a,d"}, "adaptive_calibration_dataset"),
        ({"adaptive_calibration_dataset": "c"}, "adaptive_calibration_dataset"),
    ],
)
def test_what_a_comparison_cannot_go_with_is_found(more, key):
    assert [problem.key for problem in comparison_problems({**SETS, **more})] == [key]


@pytest.mark.parametrize(
    "more",
    [{}, {"stage": "sft"}, {"finetuning_type": "adaptive"}, {"packing": False},
     {"adaptive_calibration_dataset": "d"}, {"adaptive_calibration_dataset": "b, a"}],
)  # fmt: skip
def test_what_it_can_go_with_is_not_refused(more):
    assert comparison_problems({**SETS, **more}) == []


@pytest.mark.parametrize("rows", ["c", "d,c"])
def test_an_arm_may_not_be_scored_on_rows_of_which_some_judge(rows):
    settings = {"finetuning_type": "adaptive", "adaptive_method": "sensitivity", "adaptive_calibration_dataset": rows}
    arm = parse_arm(f"cal:{{adaptive_method: sensitivity, adaptive_calibration_dataset: '{rows}'}}")
    with pytest.raises(AdaptiveConfigError, match=r"^adaptive_calibration_dataset: .* held out .*\(arm cal\)"):
        check_arm(arm, {"dataset": "a,b", **settings}, SETS)


def test_a_calibration_set_that_is_the_training_set_is_drawn_from_what_all_arms_train_on():
    assert without_training_set({**SETS, "adaptive_calibration_dataset": ["b", "a"]}) == SETS
    other = {**SETS, "adaptive_calibration_dataset": "d"}
    assert without_training_set(other) == other


@pytest.mark.parametrize(("warmup", "refused"), [(20, True), (30.0, True), (19, False), (0.1, False), (None, False)])
def test_a_warmup_as_long_as_the_shortest_runs_is_refused(warmup, refused):
    assert bool(warmup_problems({"warmup_steps": warmup}, 20)) == refused


def test_visible_devices_are_those_of_the_environment(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 5")
    assert visible_devices() == ["4", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_devices() == []


def test_gpus_count_where_runs_may_take_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sizes = [SimpleNamespace(name="A", total_memory=80), SimpleNamespace(name="A", total_memory=40)]
    monkeypatch.setattr("torch.cuda.get_device_properties", sizes.__getitem__)
    assert gpu_kinds({}) == [("A", 80), ("A", 40)]
    assert gpu_kinds({"use_cpu": True}) == []


@pytest.mark.parametrize("name", built_in_arms())
def test_an_arm_that_has_a_name_can_run_without_further_settings(name, tiny_llama, data_dir, tmp_path):
    require_enabled()
    ours = settings(tiny_llama, data_dir, tmp_path / "out", finetuning_type="lora")
    given = {key: value for key, value in ours.items() if not key.startswith("adaptive_")}
    arm = next(arm for arm in choose_arms([name], [], given) if arm.name == name)
    check_arm(arm, run_settings(given, arm, GridPoint(1e-3), 0, 4, ()), given)


def measured(name, given, own=()):
    arm = next(arm for arm in choose_arms([] if own else [name], own, given) if arm.name == name)
    return measured_before_training(run_settings(given, arm, GridPoint(1e-3), 0, 4, ()))


def test_everything_that_an_arm_measures_before_it_trains_is_counted_and_once_where_it_is_the_same(
    tiny_llama, data_dir, tmp_path
):
    require_enabled()
    ours = settings(tiny_llama, data_dir, tmp_path / "out", finetuning_type="lora")
    given = {key: value for key, value in ours.items() if not key.startswith("adaptive_")}
    names = ("sensitivity", "by_type", "fisher", "srlora", "gora_ranks", "gora", "eva", "tsq", "tsq_samples")
    keys = {name: measured(name, given) for name in names}
    assert keys["sensitivity"] == keys["by_type"]
    assert len(set(keys.values()) - {None}) == len(names) - 1, keys
    assert {measured(name, given) for name in ("lora", "random", "uniform", "prilora", "igu", "tsq_ranks")} == {None}
    mine = "mine:{adaptive_method: uniform, adaptive_init: eva}"
    assert measured("mine", given, [mine]) == keys["eva"]


def checked_arms(given, names, own=()):
    """The arms of a comparison, each with the settings that its runs were found to be right with."""
    require_enabled()
    keys = our_keys(given)
    arms, raised = with_lowest_ranks(choose_arms(names, own, given), given, keys)
    runs = {arm.name: run_settings(given, arm, GridPoint(1e-3), 0, 4, keys) for arm in arms}
    for arm in arms:
        check_arm(arm, runs[arm.name], given)
    return runs, raised


@pytest.mark.parametrize("regime", WORTH_IT.REGIMES)
def test_every_arm_of_a_regime_of_the_benchmark_can_run(regime, tiny_llama, data_dir):
    """One that is refused would keep the whole comparison from starting."""
    regime_settings = WORTH_IT.settings(WORTH_IT.REGIMES[regime], tiny_llama, data_dir)
    given = {**regime_settings, "dataset": "tiny_sft", "template": "default"}
    runs, raised = checked_arms(given, WORTH_IT.ARMS)
    assert set(runs) == set(WORTH_IT.ARMS)
    from_zero = given.get("adaptive_min_rank") == 0
    assert raised == ({"tsq_ranks": 1, "elalora": 1} if from_zero else {})
    assert (runs["igu"].get("adaptive_min_rank") == 0) == from_zero


@pytest.mark.parametrize(
    "more",
    [
        {"adaptive_init": "gora", "adaptive_init_gamma": 0.05, "adaptive_granularity": "layer"},
        {"adaptive_init": "eva", "adaptive_calibration_samples": 8, "adaptive_budget_unit": "ranks"},
        {"adaptive_method": "uniform", "adaptive_calibration_samples": 8},
    ],
)
def test_an_arm_of_the_yamls_own_method_can_run_beside_what_the_yaml_adds(more, tiny_llama, data_dir, tmp_path):
    given = settings(tiny_llama, data_dir, tmp_path / "out", **{"adaptive_method": "sensitivity", **more})
    runs, _ = checked_arms(given, [given["adaptive_method"], "gora", "by_type"])
    assert runs[GIVEN].items() >= more.items()


def test_arms_beside_a_given_plan_can_run(tiny_llama, data_dir, tmp_path):
    plan = make_plan(ranks=(2, 2))
    plan.write(path := tmp_path / "plan.json")
    more = {
        "adaptive_method": "igu",
        "adaptive_plan": str(path),
        "igu_second_stage": "triplet",
        "adaptive_init_rank": 4,
    }
    given = settings(tiny_llama, data_dir, tmp_path / "out", **more)
    given = {key: value for key, value in given.items() if not key.startswith("adaptive_calibration_")}
    assert checked_arms(given, ["igu"])[0][GIVEN].items() >= more.items()


def test_a_lowest_rank_that_an_arm_sets_by_itself_is_not_mended(tiny_llama, data_dir, tmp_path):
    given = settings(tiny_llama, data_dir, tmp_path / "out", finetuning_type="lora", adaptive_min_rank=0)
    samples = "samples:{adaptive_method: tsq, tsq_reallocation: false}"
    runs, raised = checked_arms(given, ["tsq", "uniform"], [samples])
    assert (raised, runs["tsq"]["adaptive_min_rank"]) == ({"tsq": 1}, 1)
    assert (runs["samples"]["adaptive_min_rank"], runs["uniform"]["adaptive_min_rank"]) == (0, 0)
    with pytest.raises(AdaptiveConfigError, match=r"would never come back \(arm mine\)"):
        checked_arms(given, [], ["mine:adaptive_method=tsq,adaptive_min_rank=0"])
    yaml = {**given, "finetuning_type": "adaptive", "adaptive_method": "elalora"}
    with pytest.raises(AdaptiveConfigError, match=r"would never come back \(arm yaml\)"):
        checked_arms(yaml, [])
