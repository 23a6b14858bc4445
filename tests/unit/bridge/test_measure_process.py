"""The measuring process: what it is told and not told, what it loads, and what is said when it ends badly."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamafactory_adaptive.bridge import measure_process
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.host_loading import as_calibration_error
from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
from llamafactory_adaptive.bridge.measure_process import _draw_rows, run_measurement_job
from llamafactory_adaptive.bridge.scoring_job import ScoringJob, scoring_settings
from llamafactory_adaptive.bridge.target_shapes import target_shapes
from llamafactory_adaptive.bridge.validation import parse_config
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.files import digest_of
from llamafactory_adaptive.methods.srlora import StableRanks
from llamafactory_adaptive.planning.cache import cache_folder
from tests.helpers.inputs import captured_inputs
from tests.helpers.tiny import rows, settings


@pytest.fixture
def checked(tiny_llama, data_dir, tmp_path):
    """A run with a secret among its settings."""
    args = settings(tiny_llama, data_dir, tmp_path / "out", hf_hub_token="secret")
    return CheckedRun(args, args, parse_config(args))


@pytest.fixture
def names(checked):
    """Names of the run's target modules."""
    return tuple(shape.name for shape in target_shapes(checked.args))


# -- the process from outside ----------------------------------------------------------------------------------------


@pytest.fixture
def child(monkeypatch):
    """Stands in for the process: notes how it was started, and ends as it is told to."""
    noted = SimpleNamespace(code=0, error=None, printed="", log_is_there=True)

    def run_child(command, environment, log, job):
        noted.command, noted.environment, noted.job, noted.log = (
            command,
            environment,
            ScoringJob.from_json(json.loads(job)),
            log,
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("all it printed")
        if noted.error:
            Path(command[-1]).write_text(json.dumps({"error": noted.error}))
        return noted.code, noted.printed

    monkeypatch.setattr(measure_process, "run_child", run_child)
    return noted


@pytest.fixture
def measure(checked, tmp_path):
    (tmp_path / "scratch").mkdir()
    run, path = LlamaFactoryRun(checked), tmp_path / "scratch" / "statistics.safetensors"
    return lambda: run.measure(InputSecondMoments(), path)


def test_it_is_no_worker_of_a_launcher_and_sees_the_same_devices(child, measure, monkeypatch):
    told = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x",
            "FORCE_TORCHRUN": "1", "ACCELERATE_USE_DEEPSPEED": "true", "HF_HOME": "/models"}  # fmt: skip
    for key, value in told.items():
        monkeypatch.setenv(key, value)
    for visible, seen in (("3,1", "3,1"), ("", ""), (None, "")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        measure()
        assert child.environment["CUDA_VISIBLE_DEVICES"] == seen
    assert set(told) & set(child.environment) == {"HF_HOME"}


def test_settings_reach_it_through_the_pipe_alone(child, measure, checked, names, tmp_path, capsys):
    measure()
    assert child.command[:4] == [sys.executable, "-m", "llamafactory_adaptive.cli", "measure"]
    path = tmp_path / "scratch" / "statistics.safetensors"
    assert child.job == ScoringJob.from_run(checked, names, InputSecondMoments(), path)
    assert child.job.settings["hf_hub_token"] == "secret"
    assert child.job.config == checked.config
    assert child.job.measurement == InputSecondMoments().key
    assert (len(child.job.modules), child.job.path) == (14, path)
    assert "secret" not in " ".join([*child.command, *child.environment.values(), capsys.readouterr().err])


def test_the_log_stays_only_where_something_went_wrong(child, measure):
    measure()
    assert child.log.parent == cache_folder() / "logs"
    assert not child.log.exists()
    child.code = 1
    with pytest.raises(CalibrationError):
        measure()
    assert child.log.read_text() == "all it printed"


# -- what it loads ---------------------------------------------------------------------------------------------------


def test_settings_are_reduced_to_loading_the_base_and_the_training_rows(tiny_llama, data_dir, tmp_path):
    args = settings(
        tiny_llama, data_dir, tmp_path / "out", deepspeed="z.json", eval_dataset="tiny_eval", packing=True,
        adapter_name_or_path="old", tokenized_path=str(tmp_path / "none"), report_to="wandb", val_size=0.1,
        adaptive_method="sensitivity", sensitivity_energy=0.9, push_to_hub=True,
    )  # fmt: skip
    reduced = scoring_settings(args)
    gone = ("deepspeed", "eval_dataset", "adapter_name_or_path", "tokenized_path", "push_to_hub", "adaptive_method",
            "sensitivity_energy", "output_dir")  # fmt: skip
    assert not set(gone) & set(reduced)
    expected = {
        "finetuning_type": "lora",
        "packing": False,
        "report_to": "none",
        "val_size": 0.1,
    }
    assert {key: reduced[key] for key in expected} == expected
    kept = ("model_name_or_path", "template", "cutoff_len", "dataset_dir", "dataset")
    assert {key: reduced[key] for key in kept} == {key: args[key] for key in kept}


def test_an_adapter_that_is_merged_first_is_part_of_the_base():
    args = {"model_name_or_path": "m", "dataset": "d", "adapter_name_or_path": "old", "create_new_adapter": True}
    assert scoring_settings(args)["adapter_name_or_path"] == "old"


def test_with_rows_of_another_data_set_the_mixture_of_the_training_set_is_gone():
    args = {"model_name_or_path": "m", "dataset": "a,b", "interleave_probs": "0.5,0.5", "mix_strategy": "concat",
            "val_size": 0.5}  # fmt: skip
    assert scoring_settings(args)["interleave_probs"] == "0.5,0.5"
    reduced = scoring_settings({**args, "adaptive_calibration_dataset": "c"})
    assert reduced["dataset"] == "c"
    assert not {"interleave_probs", "mix_strategy", "val_size"} & set(reduced)


def config(samples, seed=0):
    return SimpleNamespace(calibration=SimpleNamespace(samples=samples, seed=seed))


def test_rows_are_drawn_by_the_seed_in_their_own_order():
    data = rows(30)
    positions = {tuple(row["input_ids"]): index for index, row in enumerate(data)}

    def sample_positions(samples, seed):
        return [positions[tuple(row["input_ids"])] for row in _draw_rows(data, config(samples, seed), False)]

    drawn = [sample_positions(8, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0]))
    assert drawn[2] != drawn[0]
    assert len(drawn[0]) == 8
    assert sample_positions(99, 0) == list(range(30))


def test_a_stream_is_shuffled_by_the_seed_and_cut():
    class Stream:
        def shuffle(self, seed, buffer_size):
            assert (seed, buffer_size) == (4, 1000)
            return iter(rows(30)[::-1])

    assert _draw_rows(Stream(), config(3, seed=4), True) == rows(30)[::-1][:3]


def test_the_chosen_half_of_a_pair_is_read_and_masked_tokens_are_not():
    pair = {"chosen_input_ids": [1, 2, 3], "chosen_labels": [-100, 2, 3], "chosen_attention_mask": [1, 1, 0],
            "rejected_input_ids": [9]}  # fmt: skip
    plain = {"input_ids": [5, 6]}
    assert _draw_rows([pair, plain], config(2), False) == [
        {"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [5, 6], "labels": [5, 6]},
    ]  # fmt: skip
    with pytest.raises(CalibrationError, match="set adaptive_calibration_dataset to a text dataset"):
        _draw_rows([{**plain, "images": ["cat.png"]}], config(1), False)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no such split\nmore"), "the rows cannot be read (ValueError: no such split)"),
        (KeyError(), "the rows cannot be read (KeyError: the rows cannot be read)"),
        (CalibrationError("ours"), "ours"),
    ],
    ids=["host", "silent", "ours"],
)
def test_what_the_host_raises_is_one_line(error, said):
    with pytest.raises(CalibrationError) as caught, as_calibration_error("the rows cannot be read"):
        raise error
    assert str(caught.value) == said


# -- what it does ----------------------------------------------------------------------------------------------------


@pytest.fixture
def job(checked, names, tmp_path):
    yield ScoringJob.from_run(checked, names, InputSecondMoments(), tmp_path / "statistics.safetensors")
    PartialState._reset_state()  # what the host's parser keeps of devices for a whole process


def test_statistics_are_those_of_the_rows_that_were_drawn(job, tiny_llama, monkeypatch):
    seen, real = [], measure_process.make_batches
    monkeypatch.setattr(measure_process, "make_batches", lambda data, *more: seen.extend(data) or real(data, *more))
    run_measurement_job(job)
    assert len(seen) == 8
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    moments = load_file(job.path)
    expected = {name: inputs.square().mean(0) for name, inputs in captured_inputs(model, seen).items()}
    assert moments.keys() == expected.keys()
    assert all(torch.allclose(moments[name].double(), expected[name], rtol=1e-4) for name in moments)
    with safe_open(job.path, framework="pt") as file:
        facts = file.metadata()
    assert (facts["samples"], facts["tokens"]) == ("8", str(sum(len(row["input_ids"]) for row in seen)))
    assert facts["rows_sha256"] == digest_of([row["input_ids"] for row in seen])
    assert os.listdir(job.path.parent) == ["statistics.safetensors"]


def test_a_measurement_of_weights_alone_draws_and_names_no_rows(child, tiny_llama, data_dir, tmp_path, monkeypatch):
    args = settings(tiny_llama, data_dir, tmp_path / "out", adaptive_method="srlora")
    run, path = LlamaFactoryRun(CheckedRun(args, args, parse_config(args))), tmp_path / "empty" / "statistics"
    path.parent.mkdir()
    told = []
    monkeypatch.setattr(measure_process, "tell", told.append)
    monkeypatch.setattr("llamafactory.data.get_dataset", lambda *args, **more: pytest.fail("rows were read"))
    run.measure(StableRanks(), path)
    [said] = told
    assert said.startswith(f"scoring the weights of {tiny_llama} in a process of its own")
    assert said.endswith("; no rows are read")
    run_measurement_job(child.job)
    PartialState._reset_state()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for name, found in load_file(path).items():
        sigma = torch.linalg.svdvals(model.get_submodule(name).weight.detach())
        assert float(found) == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-3)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["samples"] == "0"


def test_the_host_writes_into_a_scratch_folder_that_is_removed(job, tmp_path, monkeypatch):
    seen = {}

    def get_train_args(given):
        seen.update(given)
        assert os.listdir(given["output_dir"]) == []
        raise ValueError("no further")

    monkeypatch.setattr("llamafactory.hparams.get_train_args", get_train_args)
    with pytest.raises(CalibrationError, match=r"settings cannot be used for scoring \(ValueError: no further\)"):
        run_measurement_job(job)
    scratch = Path(seen.pop("output_dir"))
    assert scratch != tmp_path / "out"
    assert not scratch.exists()
    assert seen == job.settings


def test_memory_that_runs_out_while_scoring_names_the_key(job, monkeypatch):
    def measurement(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(InputSecondMoments, "__call__", measurement)
    with pytest.raises(CalibrationError, match=r"lower adaptive_calibration_batch_size \(now 3\) or score in 4-bit"):
        run_measurement_job(job)
    assert not job.path.exists()
