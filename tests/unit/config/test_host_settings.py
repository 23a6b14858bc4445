"""What the environment and DeepSpeed's settings say, in every form; refused by name where it cannot go along."""

import importlib.util
import json

import pytest

from llamafactory_adaptive.config.deepspeed_settings import (
    read_section,
    read_settings,
    settings_of_accelerate,
    zero_optimization,
)
from llamafactory_adaptive.config.host_environment import check_environment
from llamafactory_adaptive.config.key_checks import check_reallocation
from llamafactory_adaptive.config.search_conflicts import check_search_conflicts
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.ranks.search_config import ReallocationConfig


ZERO = {"stage": 3, "round_robin_gradients": True}
SETTINGS = {"zero_optimization": ZERO, "bf16": {"enabled": True}}
VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "USE_RAY",
    "USE_MCA",
    "LLAMABOARD_ENABLED",
)


def problems(monkeypatch, environment, flat=None):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return {problem.key: problem.suggestion for problem in check_environment(flat or {})}


@pytest.mark.parametrize(
    ("environment", "keys"),
    [
        ({}, []),
        ({"RANK": "0", "WORLD_SIZE": "many"}, ["WORLD_SIZE"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE"]),
        ({"LOCAL_RANK": "-2"}, ["LOCAL_RANK"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK"]),
        ({"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node"}, ["MASTER_PORT"]),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, ["MASTER_ADDR", "MASTER_PORT"]),
        ({"LOCAL_RANK": "-1"}, []),
    ],
    ids=str,
)
def test_what_a_launcher_left_out_or_spoiled_is_named(environment, keys, monkeypatch):
    assert sorted(problems(monkeypatch, environment)) == keys


@pytest.mark.parametrize(("word", "on"), [("1", True), ("TRUE", True), ("y", True), ("0", False), ("no", False)])
def test_hosts_that_cannot_train_ranks_are_switched_off_by_their_own_variable(word, on, monkeypatch):
    assert problems(monkeypatch, {"USE_MCA": word}) == ({"USE_MCA": "USE_MCA=0"} if on else {})


def test_ray_has_to_be_there_and_its_workers_share_an_output_folder(monkeypatch):
    found = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found.append(name))
    ray = {"USE_RAY": "1"}
    assert problems(monkeypatch, ray) == {"USE_RAY": 'pip install "ray[default]", or USE_RAY=0'}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert problems(monkeypatch, ray) == {}
    each = {"save_on_each_node": True}
    assert problems(monkeypatch, ray, each) == {"save_on_each_node": "save_on_each_node: false, or torchrun"}
    assert problems(monkeypatch, {}, each) == {}
    assert found == ["ray"]


def test_llama_board_needs_its_panel_spelled_out(monkeypatch):
    board = {"LLAMABOARD_ENABLED": "1"}
    assert list(problems(monkeypatch, board, {"lora_rank": 8})) == ["lora_alpha, lora_target"]
    assert problems(monkeypatch, board, {"lora_rank": 8, "lora_alpha": 16, "lora_target": "all"}) == {}


def test_deepspeeds_settings_are_the_same_however_they_are_given(tmp_path):
    path = tmp_path / "z3.json"
    path.write_text(json.dumps(SETTINGS))
    for given in (SETTINGS, json.dumps(SETTINGS), f" {json.dumps(SETTINGS)}", str(path), path):
        assert read_settings(given) == SETTINGS
        assert zero_optimization(given) == ZERO


@pytest.mark.parametrize(
    "given", [None, 3, [SETTINGS], "none.json", "{", "[1]", '{"a": ' * 100_000], ids=lambda g: str(g)[:9]
)
def test_settings_that_cannot_be_read_are_left_to_deepspeed(given):
    assert read_settings(given) == {}
    assert zero_optimization(given) == {"stage": 0}


DEEPSPEED, STAGE_3 = {"ACCELERATE_USE_DEEPSPEED": "true"}, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (STAGE_3, None),
        (DEEPSPEED, {"zero_optimization": {"stage": 2}}),
        ({**STAGE_3, "ACCELERATE_USE_DEEPSPEED": "True"}, {"zero_optimization": {"stage": 3}}),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "z.json"}, "z.json"),
    ],
    ids=str,
)
def test_what_accelerate_passes_to_deepspeed_is_read_as_accelerate_reads_it(environment, expected, monkeypatch):
    for name in ("USE_DEEPSPEED", "DEEPSPEED_ZERO_STAGE", "DEEPSPEED_CONFIG_FILE"):
        monkeypatch.delenv(f"ACCELERATE_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert settings_of_accelerate() == expected
    keys = [
        problem.key
        for problem in check_search_conflicts(
            {}, make_method("igu", {"variant": "published", "importance": "integrated"})
        )
    ]
    assert keys == (["deepspeed"] if environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" and expected else [])


def test_parts_of_another_shape_are_empty():
    assert read_section({"zero_optimization": [3]}, "zero_optimization") == {}
    assert zero_optimization({"zero_optimization": {"stage": "3"}}) == {"stage": 0}


def test_a_budget_that_may_be_halved_must_have_room_for_the_lowest_ranks():
    def keys(low, **options):
        made = Tsq(TsqOptions(**options))
        search, refusals = check_reallocation("tsq", made, low, 4, 16, 7)
        assert search == ReallocationConfig(16, made.refresh_ratio, made.beta, 7)
        return {problem.key: problem.suggestion for problem in refusals}

    assert keys(3) == keys(2, phi="quality") == {}
    assert keys(3, phi="quality") == {"adaptive_min_rank": "adaptive_min_rank: 2"}
    assert keys(0) == {"adaptive_min_rank": "adaptive_min_rank: 1"}
