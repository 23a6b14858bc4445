"""Held-out losses of cuts: what is refused before, what the other process is sent, and what it computes."""

import json

import pytest
import torch
import yaml
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.calibration.row_losses import row_losses
from llamafactory_adaptive.errors import AdaptiveConfigError, CalibrationError
from llamafactory_adaptive.export.shrink.request import ShrinkRequest
from llamafactory_adaptive.export.shrink.shrinker import read_decomposition, write_cut
from tests.helpers.lora import save_adapter
from tests.helpers.tiny import settings


_bootstrap.install()
from llamafactory_adaptive.bridge import measure_process  # noqa: E402
from llamafactory_adaptive.bridge.held_out import (  # noqa: E402
    HeldOutJob,
    check_trained_alike,
    held_out_job,
    held_out_settings,
    run_held_out_job,
)


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    """The host reads sys.argv, which the settings are read by."""
    monkeypatch.setattr("sys.argv", ["llamafactory-adaptive"])
    yield
    PartialState._reset_state()


@pytest.fixture
def write(tiny_llama, data_dir, tmp_path):
    def make(**more):
        path, args = tmp_path / "run.yaml", settings(tiny_llama, data_dir, tmp_path / "out", finetuning_type="lora")
        kept = {key: value for key, value in args.items() if not key.startswith("adaptive_")}
        path.write_text(yaml.safe_dump({**kept, **more}))
        return path

    return make


@pytest.fixture
def job(tiny_llama, write, tmp_path):
    """Losses of an adapter, of its cut to half, and of the base, with the folder of the whole adapter."""
    adapter = save_adapter(tiny_llama, tmp_path / "adapter")
    found = read_decomposition(ShrinkRequest(adapter, tmp_path / "none", curve=True))
    for name in ("whole", "half", "answer"):
        (tmp_path / name).mkdir()
    whole, half = (found.spectrum.cut(found.spectrum.parameters // part) for part in (1, 2))
    write_cut(found, whole, tmp_path / "whole")
    write_cut(found, half, tmp_path / "half")
    cuts = (whole.by_name(), half.by_name(), dict.fromkeys(whole.by_name(), 0))
    return held_out_job(
        held_out_settings(write(), "tiny_eval"), "tiny_eval", 4, scale=found.scale, cuts=cuts,
        components=tmp_path / "whole" / "adapter_model.safetensors", path=tmp_path / "answer" / "losses",
    )  # fmt: skip


def test_losses_are_those_of_the_cut_adapters_in_peft(job, tiny_llama, tmp_path, monkeypatch):
    seen, real = [], measure_process.load
    monkeypatch.setattr(measure_process, "load", lambda *args: seen.append(real(*args)) or seen[0])
    run_held_out_job(HeldOutJob.from_json(json.loads(json.dumps(job.to_json()))))
    model, rows, pad_id = seen[0]
    assert not any(module._forward_hooks for module in model.modules())
    batches = make_batches(rows, 8, pad_id)
    found = load_file(job.path)
    assert found["losses"].shape == (3, 4)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    torch.testing.assert_close(found["losses"][2], row_losses(base, batches)[:, 0], rtol=1e-5, atol=1e-5)
    for number, name in enumerate(("adapter", "half")):
        fresh = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        expected = row_losses(PeftModel.from_pretrained(fresh, tmp_path / name), batches)
        torch.testing.assert_close(found["losses"][number], expected[:, 0], rtol=1e-4, atol=1e-4)
        assert found["tokens"].tolist() == expected[:, 1].tolist()


def test_the_job_comes_back_from_json_and_reads_the_held_out_rows_alone(job):
    assert HeldOutJob.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert job.settings["dataset"] == "tiny_eval"
    assert job.settings["finetuning_type"] == "lora"
    assert "output_dir" not in job.settings


@pytest.mark.parametrize(
    ("data", "part", "size"), [("tiny_sft", "eval_dataset", 6), ("tiny_eval", "train_dataset", 6)]
)
def test_rows_that_the_run_held_out_of_its_own_data_are_taken(data, part, size, write, tmp_path, monkeypatch):
    args = held_out_settings(write(val_size=0.25, adaptive_method="sensitivity"), data)
    job = held_out_job(args, data, 100, components=tmp_path, scale=1.0, cuts=({},), path=tmp_path)
    assert (job.part, job.settings["dataset"], job.settings.get("val_size")) == (
        part, data, 0.25 if part == "eval_dataset" else None
    )  # fmt: skip
    monkeypatch.setattr("llamafactory.model.load_model", lambda *args, **more: None)
    held_out = measure_process.load(job.settings, job, job.part)[1]
    trained = measure_process.load(job.settings, job, "train_dataset")[1]
    assert len(held_out) == size
    if part == "eval_dataset":
        assert len(trained) == 18
        assert not [row for row in held_out if row in trained]


def held_out_rows(config, tmp_path, *overrides):
    args = held_out_settings(config, "tiny_sft", overrides)
    job = held_out_job(args, "tiny_sft", 100, components=tmp_path, scale=1.0, cuts=({},), path=tmp_path)
    return measure_process.load(job.settings, job, job.part)[1]


def test_settings_of_the_run_s_command_line_choose_its_held_out_rows(write, tmp_path, monkeypatch):
    monkeypatch.setattr("llamafactory.model.load_model", lambda *args, **more: None)
    as_the_run = held_out_rows(write(val_size=0.25, seed=1), tmp_path)
    config = write(val_size=0.25)
    assert held_out_rows(config, tmp_path) != as_the_run, "another split"
    assert held_out_rows(config, tmp_path, "seed=1") == as_the_run
    assert len(held_out_rows(config, tmp_path, "max_samples=12")) == 3


SPLIT = "the rows that val_size held out follow from val_size, seed, dataset and max_samples"
NAMED = "/moved/base/"


@pytest.fixture
def compare(monkeypatch):
    """What is said of an adapter with this record, where settings are for a model of the folder ``base``."""
    told = []
    monkeypatch.setattr("llamafactory_adaptive.bridge.held_out.tell", told.append)

    def said(trained, data="tiny_eval", named=NAMED, **settings):
        told.clear()
        check_trained_alike({"model_name_or_path": "here/base", **settings}, data, trained, named)
        return told

    return said


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"seed": 1}, "warning: the adapter was trained with seed 1, and these settings have 3: other rows are"),
        ({"seed": 3}, SPLIT),
        ({}, SPLIT),
    ],
)
def test_a_split_by_another_seed_than_the_run_s_is_warned_of(trained, words, compare):
    settings = {"dataset": "tiny_sft", "val_size": 0.25, "seed": 3}
    [line] = compare(trained, "tiny_sft", **settings)
    assert line.startswith(words)
    assert ("add seed=1" in line) is (trained == {"seed": 1})
    assert compare(trained, "tiny_eval", **settings) == [], "rows of their own follow from no seed"


def test_an_adapter_of_another_base_is_refused_by_its_plan_and_warned_of_by_its_config(compare):
    other = {"base_model": "hub/base-instruct"}
    with pytest.raises(AdaptiveConfigError, match=r"trained on hub/base-instruct; try model_name_or_path=hub/base-in"):
        compare(other)
    assert compare({**other, "adaptive_plan": "given.json"}) == [], "the plan's model, in an older version"
    [line] = compare({}, named="hub/base-instruct")
    assert (
        line == "warning: losses are taken with here/base, and the adapter names hub/base-instruct as its base model"
    )
    assert compare({"base_model": "elsewhere/base"}, named="merged") == [], "its plan knows better"
    assert compare({}) == compare({}, named=None) == []


def test_an_adapter_of_another_model_is_one_message(job, tmp_path):
    names = [f"base_model.model.model.layers.7.q_proj.lora_{side}.weight" for side in "AB"]
    save_file({names[0]: torch.ones(1, 32), names[1]: torch.ones(32, 1)}, job.components)
    wrong = HeldOutJob.from_json({**job.to_json(), "cuts": [{"model.layers.7.q_proj": 1}]})
    with pytest.raises(CalibrationError, match=r"for another model: model.layers.7.q_proj is .* missing"):
        run_held_out_job(wrong)


REFUSED = [
    ({}, "tiny_sft", "data: 'tiny_sft' is invalid: the YAML trains on it"),
    (
        {"dataset": "tiny_sft,tiny_raw", "val_size": 0.1},
        "tiny_sft",
        "or with all of the YAML's where it has a val_size",
    ),
    ({}, "unknown", "data: 'unknown' is invalid: it is not in"),
    ({}, "tiny_lost", "data: 'tiny_lost' is invalid: its file"),
    ({"stage": "dpo"}, "tiny_eval", "stage: 'dpo' is invalid: the loss of next tokens is that of the stages"),
    ({"model_name_or_path": None}, "tiny_eval", "model_name_or_path: None is invalid: it is required"),
]


@pytest.mark.parametrize(("change", "data", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_what_cannot_be_measured_is_refused(change, data, message, write):
    with pytest.raises(AdaptiveConfigError) as caught:
        held_out_settings(write(**change), data)
    assert message in str(caught.value)
