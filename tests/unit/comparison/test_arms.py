"""Arms by name, and the settings of their runs."""

import pytest

from llamafactory_adaptive.comparison.arm_methods import keys_left_to_yaml, keys_of_no_method
from llamafactory_adaptive.comparison.arms import (
    CONTROL,
    GIVEN,
    PLAIN,
    GridPoint,
    built_in_arms,
    choose_arms,
    keys_without_effect,
    parse_arm,
    run_settings,
    without_twins,
)
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.methods import methods


YAML = {
    "model_name_or_path": "m", "finetuning_type": "adaptive", "adaptive_method": "igu", "igu_importance": "shrink",
    "adaptive_interval": 20, "adaptive_min_rank": 2, "lora_rank": 8, "learning_rate": 1e-4, "use_dora": True,
    "val_size": 0.1, "eval_strategy": "steps", "output_dir": "saves/x", "max_steps": 100, "hf_hub_token": "hf_abc",
    "data_seed": 7, "use_swanlab": True, "swanlab_project": "p", "hub_token": "hf_abc", "loraplus_lr_ratio": 8.0,
    "eval_on_start": True,
}  # fmt: skip
OURS = ("adaptive_method", "igu_importance", "adaptive_interval", "adaptive_min_rank")


def settings(name, point=None, seed=3, steps=None):
    arms = {arm.name: arm for arm in choose_arms(["igu", "dora", "sensitivity"], [], YAML)}
    return run_settings(YAML, arms[name], point or GridPoint(2e-3), seed, steps, OURS)


def test_every_method_is_an_arm_and_plain_lora_and_random_ranks_are_always_in():
    assert set(methods()) < set(built_in_arms())
    names = [arm.name for arm in choose_arms(["igu", "lora"], ["mine:use_rslora=true"], {"finetuning_type": "lora"})]
    assert names == [PLAIN, CONTROL, "igu", "mine"]
    assert [arm.name for arm in choose_arms([], [], YAML)] == [PLAIN, CONTROL, GIVEN]


def test_the_arm_of_ranks_by_type_takes_them_from_scores_as_nobody_gives_them_by_hand():
    """Runs of a recorded ledger were made with these settings, as an arm of the user's own."""
    pooled = "by_type:adaptive_method=sensitivity,adaptive_granularity=type"
    assert built_in_arms()["by_type"] == parse_arm(pooled)


def test_an_arm_of_another_method_has_the_budget_of_the_yaml_and_nothing_else_of_its_method():
    plain, sensitivity = settings(PLAIN), settings("sensitivity")
    assert not [key for key in plain if key in OURS]
    assert plain["finetuning_type"] == "lora"
    assert {key: sensitivity[key] for key in OURS if key in sensitivity} == {
        "adaptive_method": "sensitivity", "adaptive_min_rank": 2}  # fmt: skip
    assert (plain["lora_rank"], sensitivity["lora_rank"]) == (8, 8)


ROWS = {"adaptive_calibration_samples": 16, "adaptive_calibration_batch_size": 1, "adaptive_calibration_seed": 5}
PLACES = {"adaptive_calibration_process": "own", "adaptive_calibration_max_memory": "cpu=60GiB"}
METHOD = {"adaptive_method": "sensitivity", "adaptive_granularity": "layer", "sensitivity_transform": "none"}
GIVEN_PLAN = "planned:adaptive_method=fisher,adaptive_plan=p.json"


@pytest.mark.parametrize("method", [METHOD, {"finetuning_type": "lora"}])
@pytest.mark.parametrize(
    ("name", "read"),
    [(name, {**ROWS, **PLACES}) for name in ("fisher", "gora", "gora_ranks", "eva", "by_type")]
    + [("srlora", PLACES)]  # looks at weights alone
    + [(name, {}) for name in (PLAIN, CONTROL, "dora", "uniform", "prilora", "igu", "elalora", "tsq_samples")]
    + [("planned", {}), ("own", {**ROWS, **PLACES, "adaptive_calibration_samples": 4})],
)
def test_calibration_keys_reach_the_arms_that_read_them_and_no_other(name, read, method):
    given = {"finetuning_type": "adaptive", **ROWS, **PLACES, **method}
    own = [GIVEN_PLAN, "own:adaptive_method=fisher,adaptive_calibration_samples=4"]
    names = [name] if name in built_in_arms() else []
    arms = {arm.name: arm for arm in choose_arms(names, own, given)}
    run = run_settings(given, arms[name], GridPoint(1.0), 0, None, [*ROWS, *PLACES, *METHOD])
    assert {key: value for key, value in run.items() if key.startswith("adaptive_calibration")} == read


@pytest.mark.parametrize("name", [GIVEN, "igu"])
def test_the_arm_of_the_yamls_own_method_keeps_its_options(name):
    kept = settings(name)
    assert {key: kept[key] for key in OURS} == {key: YAML[key] for key in OURS}


@pytest.mark.parametrize(("name", "method"), [("eva", "uniform"), ("gora", "gora_ranks")])
def test_a_start_from_data_is_an_arm_on_the_ranks_of_its_paper(name, method):
    arms = {arm.name: arm for arm in choose_arms([name], [], YAML)}
    made = run_settings(YAML, arms[name], GridPoint(2e-3), 3, None, OURS)
    assert (made["adaptive_method"], made["adaptive_init"], made["lora_rank"]) == (method, name, 8)


def run_of(given, name, *own):
    names = ["igu", "sensitivity", "by_type", "gora", "gora_ranks", "uniform"]
    (arm,) = [arm for arm in choose_arms(names, own, given) if arm.name == name]
    return run_settings(given, arm, GridPoint(1.0), 0, None, list(ours(given)))


def ours(run):
    return {key: value for key, value in run.items() if key.split("_")[0] in ("adaptive", *methods())}


PLANNED = {"finetuning_type": "adaptive", "adaptive_method": "igu", "adaptive_plan": "p.json", "igu_beta1": 0.5,
           "igu_second_stage": "triplet", "adaptive_init_rank": 8, "adaptive_min_rank": 2}  # fmt: skip
STARTED = {"finetuning_type": "adaptive", "adaptive_method": "sensitivity", "adaptive_init": "gora",
           "adaptive_init_gamma": 0.05, "adaptive_granularity": "layer", "adaptive_budget_unit": "ranks",
           "adaptive_calibration_samples": 8, "sensitivity_metric": "trace"}  # fmt: skip


def test_an_arm_of_the_method_beside_a_plan_finds_its_own_ranks_with_its_defaults():
    assert run_of(PLANNED, GIVEN).items() >= PLANNED.items()
    assert ours(run_of(PLANNED, "igu")) == {"adaptive_method": "igu", "adaptive_min_rank": 2}
    assert keys_left_to_yaml(PLANNED, ours(PLANNED)) == [
        "adaptive_plan", "igu_beta1", "igu_second_stage", "adaptive_init_rank"]  # fmt: skip
    mine = ours(run_of(PLANNED, "mine", "mine:adaptive_method=igu,adaptive_plan=q.json"))
    assert mine == {**ours(PLANNED), "adaptive_plan": "q.json"}, "its keys are for given ranks, too"


def test_an_arm_of_the_yamls_method_has_its_own_start_scores_and_unit():
    assert run_of(STARTED, GIVEN).items() >= STARTED.items()
    kept = {"adaptive_method": "sensitivity", "adaptive_calibration_samples": 8, "sensitivity_metric": "trace"}
    assert ours(run_of(STARTED, "sensitivity")) == kept
    assert ours(run_of(STARTED, "by_type")) == {**kept, "adaptive_granularity": "type"}
    assert ours(run_of(STARTED, "gora")) == {
        "adaptive_method": "gora_ranks", "adaptive_init": "gora", "adaptive_calibration_samples": 8}  # fmt: skip


def test_a_key_that_changes_nothing_makes_no_second_arm_of_the_same_runs():
    given = {"finetuning_type": "adaptive", "adaptive_method": "uniform", "adaptive_budget_unit": "params",
             "adaptive_calibration_samples": 64}  # fmt: skip
    own = [key for key in given if key != "finetuning_type"]
    assert without_twins(choose_arms(["uniform"], [], given), given, own)[1] == {GIVEN: "uniform"}
    assert keys_of_no_method(given) == []
    assert keys_of_no_method(PLANNED) == ["adaptive_plan"]
    assert keys_of_no_method(STARTED) == [
        "adaptive_init", "adaptive_granularity", "adaptive_budget_unit", "adaptive_init_gamma"]  # fmt: skip


def test_variants_are_set_by_arms_alone():
    assert not {"use_dora", "loraplus_lr_ratio"} & set(settings(PLAIN))
    assert settings("dora")["use_dora"] is True
    assert "loraplus_lr_ratio" not in settings("dora")


def test_the_settings_of_the_yaml_as_they_are_keep_its_variants():
    assert (settings(GIVEN)["use_dora"], settings(GIVEN)["loraplus_lr_ratio"]) == (True, 8.0)


@pytest.mark.parametrize(
    ("variant", "own"),
    [({"use_rslora": True}, True), ({"use_dora": True}, True), ({"pissa_init": True}, True),
     ({"loraplus_lr_ratio": 4.0}, True), ({"use_rslora": False}, False), ({"pissa_iter": 16}, False)],
)  # fmt: skip
def test_a_plain_yaml_with_a_variant_of_lora_is_an_arm_of_its_own(variant, own):
    given = {"finetuning_type": "lora", "lora_rank": 8, "adaptive_min_rank": 2, **variant}
    arms = choose_arms([], [], given)
    assert [arm.name for arm in arms] == [PLAIN, CONTROL] + [GIVEN] * own
    if own:
        run = run_settings(given, arms[2], GridPoint(1.0), 0, None, ["adaptive_min_rank"])
        assert variant.items() <= run.items()
        assert "adaptive_min_rank" not in run, "it has no effect on plain LoRA"


def test_arms_whose_runs_are_the_same_are_made_once():
    given = {key: value for key, value in YAML.items() if key not in ("use_dora", "loraplus_lr_ratio")}
    arms, twins = without_twins(choose_arms(["igu", "sensitivity"], [], given), given, OURS)
    assert ([arm.name for arm in arms], twins) == ([PLAIN, CONTROL, "igu", "sensitivity"], {GIVEN: "igu"})
    arms, twins = without_twins(choose_arms(["igu"], [], YAML), YAML, OURS)
    assert (len(arms), twins) == (4, {}), "the YAML's arm has DoRA, too"
    plain = {"finetuning_type": "lora", "use_rslora": True}
    assert without_twins(choose_arms(["rslora"], [], plain), plain, ())[1] == {GIVEN: "rslora"}


def test_a_run_has_its_own_rate_seed_and_steps_and_neither_evaluates_nor_saves_on_the_way():
    run = settings(PLAIN, GridPoint(5e-4, 32), seed=7, steps=50)
    assert (run["learning_rate"], run["lora_alpha"], run["seed"], run["max_steps"]) == (5e-4, 32, 7, 50)
    assert settings(PLAIN)["max_steps"] == 100
    assert "lora_alpha" not in settings(PLAIN)
    assert (run["eval_strategy"], run["save_strategy"], run["report_to"]) == ("no", "no", "none")
    assert not {
        "val_size",
        "output_dir",
        "data_seed",
        "eval_on_start",
        "use_swanlab",
        "swanlab_project",
        "hub_token",
    } & set(run)
    assert run["hf_hub_token"] == "hf_abc", "base model and data may need it"


def test_settings_that_no_run_uses_are_listed():
    assert keys_without_effect({**YAML, "report_to": "none", "plot_loss": True, "do_train": True}) == [
        "eval_strategy", "data_seed", "use_swanlab", "swanlab_project", "hub_token", "eval_on_start",
        "plot_loss"]  # fmt: skip


def test_an_arm_of_ones_own_is_read_as_yaml():
    arm = parse_arm("igu off:adaptive_method=igu,igu_importance=off,igu_beta1=0.5")
    assert arm.name == "igu off"
    assert arm.settings == {"finetuning_type": "adaptive", "adaptive_method": "igu", "igu_importance": False,
                            "igu_beta1": 0.5}  # fmt: skip
    assert parse_arm("r:use_rslora=true").settings == {"finetuning_type": "lora", "use_rslora": True}
    assert parse_arm("r:lora_dropout=5e-2,loraplus_lr_ratio=1e1").settings == {
        "finetuning_type": "lora", "lora_dropout": 0.05, "loraplus_lr_ratio": 10.0}  # fmt: skip


def test_an_arm_of_ones_own_may_be_a_mapping_with_lists():
    arm = parse_arm("qv:{lora_target: [q_proj, v_proj], lora_dropout: 5e-2, adaptive_method: igu}")
    assert arm.settings == {
        "finetuning_type": "adaptive", "lora_target": "q_proj,v_proj", "lora_dropout": 0.05,
        "adaptive_method": "igu"}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("igu", "must be NAME:key=value"),
        ("x:adaptive_method", "is no key=value"),
        ("../x:use_rslora=true", "must be NAME:key=value"),
        ("x:learning_rate=1", "learning_rate is the same for all arms, or tuned for each"),
        ("r4:lora_rank=4", "lora_rank is one budget for all arms; try lora_rank in the YAML, or `.* shrink --curve`"),
        ("x:do_eval=true", "do_eval is the same for all arms"),
        ("x:cutoff_len=8", "cutoff_len has no effect: all arms train on the same rows"),
        ("x:{template: qwen}", "template has no effect"),
        ("x:packing=true", "packing has no effect"),
        ("x:deepspeed=ds.json", "deepspeed is the same for all arms"),
        ("x:adapter_name_or_path=a", "adapter_name_or_path is the same for all arms"),
        ("x:eval_dataset=a", "eval_dataset is the same for all arms"),
        ("x:hub_model_id=a", "hub_model_id is the same for all arms"),
        ("x:lora_target=q_proj,v_proj", r"'v_proj' is no key=value; a list needs the form NAME:\{key"),
        ("x:{lora_target: [q_proj}", "cannot be read as YAML"),
        ("x:lora_target=[q_proj", "a value cannot be read as YAML"),
        ("x:{1: 2}", "must be {key: value"),
    ],
)
def test_what_is_no_arm_is_refused(text, said):
    with pytest.raises(AdaptiveConfigError, match=said):
        parse_arm(text)


def test_unknown_and_repeated_names_are_refused():
    for name, near in {"igo": "igu", "sensitivty": "sensitivity", "Dora": "dora"}.items():
        with pytest.raises(AdaptiveConfigError, match=f"must be one of lora, rslora.*; try --arms {near}$"):
            choose_arms([name], [], {})
    with pytest.raises(AdaptiveConfigError, match="there is an arm called igu already"):
        choose_arms(["igu"], ["igu:use_rslora=true"], {})
