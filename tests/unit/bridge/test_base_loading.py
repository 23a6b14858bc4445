"""A base that was measured in the training process is what the host's load gets: once, and only where it fits."""

import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from llamafactory_adaptive.bridge import measure_process
from llamafactory_adaptive.bridge.base_loading import BaseHandover, handover, steerable, with_arguments
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun, measures_here
from llamafactory_adaptive.bridge.random_state import random_state_kept
from llamafactory_adaptive.bridge.validation import parse_config
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.errors import CalibrationError
from tests.helpers.tiny import SIZES, settings, tiny_model


class AutoModel:
    """Stands in for transformers' auto class; counts its loads."""

    loads: list[dict]

    @classmethod
    def from_pretrained(cls, **arguments):
        AutoModel.loads.append(arguments)
        with random_state_kept():
            return tiny_model()


@pytest.fixture
def auto():
    AutoModel.loads = []
    return steerable(AutoModel)


ASKED = {"pretrained_model_name_or_path": "base", "device_map": {"": torch.device("cpu")}, "torch_dtype": "auto"}


def config(**more):
    return LlamaConfig(**{**SIZES, **more})


@pytest.fixture
def host(auto):
    """The host's load for training, which goes on to attach an adapter."""

    def load_base(is_trainable):
        assert is_trainable
        auto.from_pretrained(config=config(), **ASKED)
        pytest.fail("the host went on with the base")

    return SimpleNamespace(load_base=load_base)


def test_the_measured_base_is_what_the_host_gets_once(auto, host):
    base = BaseHandover()
    with base.offered():
        for _ in range(2):  # scores, then the start of the factors
            with base.opened(host) as model:
                pass
        assert auto.from_pretrained(config=config(), **ASKED) is model
        assert len(AutoModel.loads) == 1
        assert auto.from_pretrained(config=config(), **ASKED) is not model
    assert len(AutoModel.loads) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"pretrained_model_name_or_path": "other"},
        {"device_map": "auto"},
        {"revision": "main"},
        {"config": config(use_cache=False)},
        {"config": config(attn_implementation="eager")},
    ],
    ids=["path", "device map", "revision", "config", "attention"],
)
def test_another_base_is_loaded(other, auto, host):
    base = BaseHandover()
    with base.offered():
        with base.opened(host) as model:
            pass
        assert auto.from_pretrained(**{"config": config(), **ASKED, **other}) is not model
    assert len(AutoModel.loads) == 2


def test_a_base_that_was_written_to_is_loaded_again(auto, host):
    base = BaseHandover()
    with base.offered():
        with base.opened(host) as model, torch.no_grad():
            model.lm_head.weight.add_(1.0)
        assert auto.from_pretrained(config=config(), **ASKED) is not model


def test_outside_of_a_run_and_after_it_nothing_is_kept(auto, host):
    base = BaseHandover()
    with base.offered():
        assert handover.get() is base
        with base.opened(host) as model:
            pass
    assert handover.get() is None
    assert auto.from_pretrained(config=config(), **ASKED) is not model


def test_a_load_that_goes_another_way_is_refused_with_the_key():
    host = SimpleNamespace(load_base=lambda is_trainable: None)
    with pytest.raises(CalibrationError, match="set adaptive_calibration_process: own"), BaseHandover().opened(host):
        pass


def test_an_auto_class_keeps_its_name_and_takes_more_arguments(auto):
    assert (auto.__name__, auto.__module__) == (AutoModel.__name__, AutoModel.__module__)
    with with_arguments({"device_map": "auto", "offload_folder": "x"}):
        auto.from_pretrained(**ASKED)
    auto.from_pretrained(**ASKED)
    assert AutoModel.loads == [{**ASKED, "device_map": "auto", "offload_folder": "x"}, ASKED]


# -- where a run is measured ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_llama, data_dir, tmp_path):
    def make(**more):
        args = settings(tiny_llama, data_dir, tmp_path / "out")
        return CheckedRun(args, args | more, parse_config(args | {k: v for k, v in more.items() if "adaptive" in k}))

    return make


def test_a_run_alone_on_a_text_model_is_measured_where_it_trains(run):
    assert measures_here(run(), "LlamaForCausalLM")
    assert measures_here(run(quantization_bit=4), "LlamaForCausalLM")


@pytest.mark.parametrize(
    "more",
    [
        {"adaptive_calibration_process": "own"},
        {"adaptive_calibration_max_memory": "cpu=1GB"},
        {"quantization_bit": 8},
        {"quantization_method": "hqq", "quantization_bit": 4},
        {"use_unsloth": True},
        {"create_new_adapter": True},
        {"add_tokens": "<x>"},
        {"enable_liger_kernel": True},
    ],
    ids=str,
)
def test_one_whose_base_is_loaded_otherwise_is_measured_apart(more, run):
    assert not measures_here(run(**more), "LlamaForCausalLM")


def test_so_is_a_model_of_more_than_text_and_a_worker(run, monkeypatch):
    checked = run()
    assert not measures_here(checked, "Qwen2VLForConditionalGeneration")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not measures_here(checked, "LlamaForCausalLM")


def test_without_a_training_process_a_process_of_its_own_measures(run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(measure_process, "measure_in_own_process", lambda job: seen.append("own"))
    monkeypatch.setattr(measure_process, "measure_in_training_process", lambda job, base: seen.append(base))
    LlamaFactoryRun(run()).measure(InputSecondMoments(), tmp_path / "x")
    base = BaseHandover()
    with base.offered():
        LlamaFactoryRun(run()).measure(InputSecondMoments(), tmp_path / "x")
    assert seen == ["own", base]


def test_a_failure_here_is_one_line_with_a_log_and_advice(run, monkeypatch, tmp_path, capsys):
    """Everything that the child process would have told, without the child: memory ran out in the first pass."""
    from accelerate import PartialState

    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path / "cache"))

    def measurement(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setattr(InputSecondMoments, "__call__", measurement)
    (tmp_path / "empty").mkdir()
    base = BaseHandover()
    with base.offered(), pytest.raises(CalibrationError) as caught:
        LlamaFactoryRun(run()).measure(InputSecondMoments(), tmp_path / "empty" / "x")
    PartialState._reset_state()
    [log] = (tmp_path / "cache" / "logs").iterdir()
    assert "cannot be scored (memory ran out: lower adaptive_calibration_batch_size" in str(caught.value)
    assert "quantization_bit: 4" in str(caught.value)
    assert "adaptive_calibration_process: own" in str(caught.value)
    assert str(caught.value).endswith(f"(the whole log: {log})")
    assert "Traceback" in log.read_text()
    assert "Traceback" not in "".join(capsys.readouterr())
    assert logging.root.manager.disable == logging.NOTSET
