"""A process of its own spreads the base over devices: the same statistics, and nothing left behind."""

import dataclasses
import os

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import TrainingArguments

from llamafactory_adaptive.bridge import measure_process
from llamafactory_adaptive.bridge.base_placing import visible_devices
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.host_loading import seeing_one_device
from llamafactory_adaptive.bridge.measure_process import run_measurement_job
from llamafactory_adaptive.bridge.scoring_job import ScoringJob
from llamafactory_adaptive.bridge.target_shapes import target_shapes
from llamafactory_adaptive.bridge.validation import parse_config
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.config.placement import Placement
from llamafactory_adaptive.errors import AdaptiveConfigError, CalibrationError
from tests.helpers.tiny import settings


@pytest.fixture
def job(tiny_llama, data_dir, tmp_path):
    """Make the job of a run whose base is placed by the keys given."""

    def make(name="statistics", **keys):
        args = settings(tiny_llama, data_dir, tmp_path / "out")
        checked = CheckedRun(args, args, dataclasses.replace(parse_config(args), placement=Placement(**keys)))
        names = [shape.name for shape in target_shapes(args)]
        return ScoringJob.from_run(checked, names, InputSecondMoments(), tmp_path / name)

    yield make
    PartialState._reset_state()  # what the host's parser keeps of devices for a whole process


def test_a_base_that_is_spread_over_memory_and_disk_gives_the_same_statistics(job, tmp_path, monkeypatch):
    loaded, real = [], measure_process.input_device
    monkeypatch.setattr(measure_process, "input_device", lambda model: loaded.append(model) or real(model))
    plain, spread = job("plain"), job("spread", max_memory="cpu=120KiB", offload_folder=str(tmp_path / "disk"))
    run_measurement_job(plain)
    PartialState._reset_state()
    run_measurement_job(spread)
    assert set(map(str, loaded[1].hf_device_map.values())) == {"cpu", "disk"}
    expected, found = load_file(plain.path), load_file(spread.path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert os.listdir(tmp_path / "disk") == []


def test_a_base_of_which_no_layer_fits_is_refused_with_the_key(job):
    with pytest.raises(CalibrationError, match="within cpu=1KiB: raise adaptive_calibration_max_memory"):
        run_measurement_job(job(max_memory="cpu=1KiB"))


def test_a_folder_that_cannot_be_written_is_refused_with_its_key(job, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AdaptiveConfigError, match="adaptive_calibration_offload_folder"):
        run_measurement_job(job(offload_folder=str(tmp_path / "file")))


def test_the_hosts_parser_counts_one_gpu_where_there_are_more(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 4
    with seeing_one_device():
        assert arguments.n_gpu == 1
    assert arguments.n_gpu == 4
    PartialState._reset_state()


@pytest.mark.parametrize(
    ("device_map", "visible", "seen"),
    [("auto", "3,1", "3,1"), ("sequential", "", ""), ("auto", None, "0,1"), ("single", "3,1", None)],
)
def test_all_devices_are_seen_unless_the_base_is_to_stay_on_one(device_map, visible, seen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_devices(Placement(device_map=device_map)) == seen
