"""Keys that say where a base is measured: what they allow, and that they ask for no other plan."""

import dataclasses

import pytest

from llamafactory_adaptive.bridge.validation import parse_config
from llamafactory_adaptive.config.placement import Placement, check_placement, parse_max_memory
from llamafactory_adaptive.config.run_config import CalibrationConfig
from llamafactory_adaptive.errors import AdaptiveConfigError
from tests.helpers.tiny import pruning_settings, settings


def given(**keys):
    placement = dataclasses.asdict(dataclasses.replace(Placement(), **keys))
    return {f"adaptive_calibration_{name}": value for name, value in placement.items()}


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("0=20GiB", {0: 20 * 2**30}),
        ("0=1.5GB, cpu=300MiB", {0: 1_500_000_000, "cpu": 300 * 2**20}),
        ("CPU = 2 kib", {"cpu": 2048}),
    ],
)
def test_sizes_are_read_by_device(text, shares):
    assert parse_max_memory(text) == shares


@pytest.mark.parametrize("text", ["", "20GiB", "0=20", "0=20GiB,", "disk=1GB", "0=1GB,0=2GB", "0=-1GB", "cuda:0=1GB"])
def test_what_is_no_device_and_size_is_refused_with_an_example(text):
    [problem] = check_placement(given(max_memory=text))
    assert problem.suggestion == "adaptive_calibration_max_memory: 0=20GiB,cpu=60GiB"


def test_memory_of_several_devices_goes_with_a_base_that_is_spread():
    assert check_placement(given(max_memory="0=1GB")) == []
    [problem] = check_placement(given(max_memory="0=1GB", device_map="single"))
    assert problem.suggestion == "adaptive_calibration_device_map: auto"


@pytest.mark.parametrize(
    ("keys", "own"),
    [
        ({}, False),
        ({"process": "own"}, True),
        ({"device_map": "sequential"}, True),
        ({"device_map": "single"}, True),
        ({"max_memory": "cpu=1GB"}, True),
        ({"offload_folder": "x"}, True),
    ],
)
def test_what_only_a_process_of_its_own_can_do_asks_for_one(keys, own):
    assert Placement(**keys).asks_for_own_process is own


def test_the_keys_reach_the_configuration_and_no_other_part_of_it(tiny_llama, data_dir, tmp_path):
    where = {"process": "own", "device_map": "balanced", "max_memory": "cpu=1GB", "offload_folder": "x"}
    plain = parse_config(settings(tiny_llama, data_dir, tmp_path / "out"))
    placed = parse_config(settings(tiny_llama, data_dir, tmp_path / "out", **given(**where)))
    assert placed.placement == Placement(**where)
    assert dataclasses.replace(placed, placement=Placement()) == plain
    assert placed.calibration == plain.calibration == CalibrationConfig(None, 8, 3, 42)


def test_a_method_that_measures_nothing_before_training_refuses_them(tiny_llama, data_dir, tmp_path):
    args = pruning_settings(tiny_llama, data_dir, tmp_path / "out", adaptive_calibration_process="own")
    with pytest.raises(AdaptiveConfigError, match="adaptive_calibration_process"):
        parse_config(args)
