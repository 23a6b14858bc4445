"""Environment variables with odd values: told by name before anything is loaded, or taken as what they must mean."""

import json

import pytest

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import AdaptiveConfigError
from tests.helpers.tiny import settings


_bootstrap.install()
from llamafactory_adaptive.bridge import training_run  # noqa: E402
from llamafactory_adaptive.bridge.resuming import layout  # noqa: E402
from llamafactory_adaptive.bridge.target_shapes import estimated_steps  # noqa: E402
from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402
from llamafactory_adaptive.planning.cache import CACHE_ENV, cache_folder  # noqa: E402


MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
WRONG = [
    ({"LOCAL_RANK": "x"}, {"LOCAL_RANK"}),
    ({"LOCAL_RANK": ""}, {"LOCAL_RANK"}),
    ({"RANK": "x", "WORLD_SIZE": "-1"}, {"RANK", "WORLD_SIZE"}),
    ({"RANK": "1"}, {"RANK"}),
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING}, {"RANK"}),
    ({"WORLD_SIZE": "2"}, {"RANK", "MASTER_ADDR", "MASTER_PORT"}),
    ({"LOCAL_RANK": "0"}, {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}),
]
RIGHT = [
    {},
    {"LOCAL_RANK": "-1"},
    {"RANK": "0", "WORLD_SIZE": "1", **MEETING},
    {"RANK": "1", "WORLD_SIZE": "2", **MEETING},  # a node of a cluster, on which torchrun is about to start
    {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **MEETING},
]


@pytest.fixture
def args(tiny_llama, data_dir, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", *MEETING):
        monkeypatch.delenv(name, raising=False)
    return settings(tiny_llama, data_dir, tmp_path / "out")


@pytest.mark.parametrize(("environment", "keys"), WRONG, ids=[" ".join(environment) for environment, _ in WRONG])
def test_half_a_launcher_is_told_by_the_names_of_its_variables(environment, keys, args, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AdaptiveConfigError) as caught:
        parse_config(args)
    assert {problem.key for problem in caught.value.problems} == keys


@pytest.mark.parametrize("environment", RIGHT, ids=str)
def test_what_launchers_set_passes(environment, args, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parse_config(args)


@pytest.mark.parametrize("word", ["0", "false", "False", "no", "OFF"])
def test_every_word_for_no_switches_the_plugin_off(word, monkeypatch):
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE", word)
    assert not _bootstrap.enabled()


@pytest.mark.parametrize("word", ["1", "true", ""])
def test_other_words_leave_it_on(word, monkeypatch):
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE", word)
    assert _bootstrap.enabled()


@pytest.mark.parametrize(("ours", "xdg", "expected"), [
    ("", None, "home/.cache/llamafactory_adaptive"), ("", "", "home/.cache/llamafactory_adaptive"),
    ("~/mine", None, "home/mine"), ("", "xdg", "xdg/llamafactory_adaptive"),
])  # fmt: skip
def test_the_cache_never_lands_where_a_run_was_started(ours, xdg, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(CACHE_ENV, ours)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg and str(tmp_path / xdg))
    monkeypatch.chdir(tmp_path)
    assert cache_folder() == tmp_path / expected
    assert {path.name for path in tmp_path.iterdir()} <= {"home", "xdg"}


@pytest.mark.parametrize("name", ["NPROC_PER_NODE", "NNODES"])
@pytest.mark.parametrize("word", ["gpu", "1:3", "", "0"])
def test_steps_are_not_estimated_where_processes_are_no_number(name, word, args, monkeypatch):
    assert estimated_steps(args) > 0
    monkeypatch.setenv(name, word)
    assert estimated_steps(args) is None


def test_deepspeed_asked_for_by_the_environment_alone(args, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(AdaptiveConfigError, match="ACCELERATE_USE_DEEPSPEED: 'true' is invalid: DeepSpeed runs"):
        training_run._refuse_deepspeed_alone(args)


def test_the_layout_is_the_same_however_deepspeed_is_given(tmp_path, monkeypatch):
    given = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    of_mapping = layout({"deepspeed": given})
    assert of_mapping["deepspeed_stage"] == 2
    assert of_mapping["round_robin_gradients"]
    assert of_mapping == layout({"deepspeed": json.dumps(given)}) == layout({"deepspeed": str(path)})
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "none"))
    assert layout({})["deepspeed_stage"] is None


@pytest.mark.parametrize("part", [5, [], None, {"stage": "x"}, {"stage": [3]}], ids=str)
@pytest.mark.parametrize("key", ["zero_optimization", "data_types"])
def test_settings_of_deepspeed_of_another_shape_are_left_to_the_host(key, part, args):
    """The host tells what is wrong in them; to us they are settings without a stage, and else change nothing."""
    parts = {"zero_optimization": {"stage": 1}, key: part}
    assert parse_config({**args, "deepspeed": parts}) == parse_config(args)
    assert layout({"deepspeed": parts})["deepspeed_stage"] == (0 if key == "zero_optimization" else 1)
