"""Arms by name, and the settings of their runs."""

import pytest

from llamafactory_adaptive.comparison.arms import (
    CONTROL,
    GIVEN,
    PLAIN,
    GridPoint,
    built_in_arms,
    choose_arms,
    parse_arm,
    run_settings,
    without_secrets,
)
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.methods import methods


YAML = {
    "model_name_or_path": "m", "finetuning_type": "adaptive", "adaptive_method": "igu", "igu_importance": "shrink",
    "adaptive_interval": 20, "adaptive_min_rank": 2, "lora_rank": 8, "learning_rate": 1e-4, "use_dora": True,
    "val_size": 0.1, "eval_strategy": "steps", "output_dir": "saves/x", "max_steps": 100, "hf_hub_token": "hf_abc",
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


def test_an_arm_of_another_method_has_the_budget_of_the_yaml_and_nothing_else_of_its_method():
    plain, sensitivity = settings(PLAIN), settings("sensitivity")
    assert not [key for key in plain if key in OURS]
    assert plain["finetuning_type"] == "lora"
    assert {key: sensitivity[key] for key in OURS if key in sensitivity} == {
        "adaptive_method": "sensitivity", "adaptive_min_rank": 2}  # fmt: skip
    assert (plain["lora_rank"], sensitivity["lora_rank"]) == (8, 8)


@pytest.mark.parametrize("name", [GIVEN, "igu"])
def test_the_arm_of_the_yamls_own_method_keeps_its_options(name):
    kept = settings(name)
    assert {key: kept[key] for key in OURS} == {key: YAML[key] for key in OURS}


def test_variants_are_set_by_arms_alone():
    assert "use_dora" not in settings(PLAIN)
    assert settings("dora")["use_dora"] is True


def test_a_run_has_its_own_rate_seed_and_steps_and_neither_evaluates_nor_saves_on_the_way():
    run = settings(PLAIN, GridPoint(5e-4, 32), seed=7, steps=50)
    assert (run["learning_rate"], run["lora_alpha"], run["seed"], run["max_steps"]) == (5e-4, 32, 7, 50)
    assert settings(PLAIN)["max_steps"] == 100
    assert "lora_alpha" not in settings(PLAIN)
    assert (run["eval_strategy"], run["save_strategy"], run["report_to"]) == ("no", "no", "none")
    assert not {"val_size", "output_dir"} & set(run)


def test_an_arm_of_ones_own_is_read_as_yaml():
    arm = parse_arm("igu off:adaptive_method=igu,igu_importance=off,igu_beta1=0.5")
    assert arm.name == "igu off"
    assert arm.settings == {"finetuning_type": "adaptive", "adaptive_method": "igu", "igu_importance": False,
                            "igu_beta1": 0.5}  # fmt: skip
    assert parse_arm("r:use_rslora=true").settings == {"finetuning_type": "lora", "use_rslora": True}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("igu", "must be NAME:key=value"),
        ("x:adaptive_method", "is no key=value"),
        ("../x:use_rslora=true", "must be NAME:key=value"),
        ("x:learning_rate=1", "learning_rate is the same for all arms, or tuned for each"),
        ("x:do_eval=true", "do_eval is the same for all arms"),
    ],
)
def test_what_is_no_arm_is_refused(text, said):
    with pytest.raises(AdaptiveConfigError, match=said):
        parse_arm(text)


def test_unknown_and_repeated_names_are_refused():
    with pytest.raises(AdaptiveConfigError, match="must be one of lora, rslora"):
        choose_arms(["igo"], [], {})
    with pytest.raises(AdaptiveConfigError, match="there is an arm called igu already"):
        choose_arms(["igu"], ["igu:use_rslora=true"], {})


def test_tokens_and_keys_reach_no_file():
    kept = without_secrets({"hf_hub_token": "x", "swanlab_api_key": "y", "tokenized_path": "z", "lora_rank": 8})
    assert kept == {"tokenized_path": "z", "lora_rank": 8}
