"""The host's own keys with wrong values: one message each before anything is loaded, no traceback."""

import pytest

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import AdaptiveConfigError
from tests.helpers.tiny import settings


_bootstrap.install()
from llamafactory_adaptive.bridge.host_check import check_host_settings, check_output  # noqa: E402
from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402


WRONG = [
    (
        {"lora_dropout": "a lot"},
        "lora_dropout: 'a lot' is invalid: must be a finite number; try lora_dropout: 0",
    ),
    ({"lora_dropout": 2.0}, "lora_dropout: 2.0 is invalid: must be between 0 and 0.999"),
    ({"lora_dropout": -0.5}, "lora_dropout: -0.5 is invalid"),
    ({"max_steps": "many"}, "max_steps: 'many' is invalid: must be a whole number"),
    ({"max_steps": 0}, "max_steps: 0 is invalid: must be at least 1, or -1 to train num_train_epochs"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is invalid: must be at least 1"),
    ({"per_device_train_batch_size": -2}, "per_device_train_batch_size: -2 is invalid"),
    ({"per_device_train_batch_size": "big"}, "per_device_train_batch_size: 'big' is invalid"),
    ({"learning_rate": "fast"}, "learning_rate: 'fast' is invalid: must be a finite number"),
    ({"learning_rate": -1.0}, "learning_rate: -1.0 is invalid: must be at least 0"),
    ({"learning_rate": float("nan")}, "learning_rate: nan is invalid: must be a finite number"),
    ({"learning_rate": float("inf")}, "learning_rate: inf is invalid"),
    ({"cutoff_len": 0}, "cutoff_len: 0 is invalid: must be at least 1; try cutoff_len: 2048"),
    ({"cutoff_len": -10}, "cutoff_len: -10 is invalid"),
    ({"cutoff_len": "2k"}, "cutoff_len: '2k' is invalid: must be a whole number"),
    ({"seed": -1}, "seed: -1 is invalid: must be between 0 and 4,294,967,295"),
    ({"seed": 1.5}, "seed: 1.5 is invalid: must be a whole number"),
    ({"seed": "lucky"}, "seed: 'lucky' is invalid: must be a whole number"),
    ({"lora_rank": None}, "lora_rank: None is invalid: must be a number; try lora_rank: 8"),
    ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps: True is invalid"),
    ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs: 0 is invalid: must be above 0"),
    ({"report_to": "neptune"}, "report_to: 'neptune' is invalid: its package is not installed; try pip install"),
    ({"pissa_convert": True}, "pissa_convert: True is invalid: PiSSA changes the base weights"),
]
COMBINATIONS = [
    ({"train_on_prompt": True, "mask_history": True}, "train_on_prompt"),
    ({"use_galore": True}, "use_galore: True is invalid: LLaMA-Factory refuses it (Cannot use LoRA with GaLore"),
    ({"streaming": True, "max_steps": -1}, "max_steps: -1 is invalid: LLaMA-Factory refuses it (Please specify"),
    ({"stage": "dpo", "predict_with_generate": True}, "predict_with_generate: True is invalid"),
    ({"do_eval": True}, "LLaMA-Factory refuses it (Please make sure eval_dataset be provided"),
]


@pytest.mark.parametrize(("change", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_value_is_told_with_what_is_allowed(change, said, tiny_llama, data_dir, tmp_path):
    with pytest.raises(AdaptiveConfigError) as caught:
        parse_config(settings(tiny_llama, data_dir, tmp_path / "out", **change))
    assert said in str(caught.value)


def test_all_wrong_values_at_once(tiny_llama, data_dir, tmp_path):
    wrong = {"cutoff_len": 0, "learning_rate": "fast", "seed": -1, "adaptive_min_rank": -1}
    with pytest.raises(AdaptiveConfigError) as caught:
        parse_config(settings(tiny_llama, data_dir, tmp_path / "out", **wrong))
    assert sorted(problem.key for problem in caught.value.problems) == sorted(wrong)


@pytest.mark.parametrize(("change", "said"), COMBINATIONS, ids=lambda value: str(value)[:40])
def test_what_the_host_refuses_is_refused_before_planning(change, said, tiny_llama, data_dir, tmp_path):
    args = settings(tiny_llama, data_dir, tmp_path / "out", **change)
    with pytest.raises(AdaptiveConfigError) as caught:
        check_host_settings(args)
    assert said in str(caught.value)


def test_good_settings_pass_and_no_process_state_is_made(tiny_llama, data_dir, tmp_path, monkeypatch):
    from accelerate.state import PartialState
    from transformers import TrainingArguments

    monkeypatch.setattr(PartialState, "_shared_state", {})
    before = TrainingArguments.__dict__["_setup_devices"]
    check_host_settings(settings(tiny_llama, data_dir, tmp_path / "out", bf16=True, deepspeed="/no/such.json"))
    assert PartialState._shared_state == {}
    assert TrainingArguments.__dict__["_setup_devices"] is before
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_anything(tiny_llama, data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", "/proc/out"):
        with pytest.raises(AdaptiveConfigError, match=r"output_dir: .* is invalid: nothing can be written there"):
            check_output(settings(tiny_llama, data_dir, folder))
    check_output(settings(tiny_llama, data_dir, tmp_path / "good"))
    assert not (tmp_path / "good").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"USE_RAY": "1"}, "USE_RAY: '1' is invalid: Ray is not installed"),
        ({"USE_MCA": "1"}, "USE_MCA: '1' is invalid: Megatron"),
        ({"USE_MEGATRON_BRIDGE": "1"}, "USE_MEGATRON_BRIDGE: '1' is invalid: Megatron-Bridge"),
        ({"USE_V1": "1"}, "USE_V1: '1' is invalid: v1 of LLaMA-Factory"),
        ({"LLAMABOARD_ENABLED": "1"}, "lora_alpha, lora_target: None is invalid: LLaMA Board does not pass"),
    ],
)
def test_hosts_of_another_kind_are_named(environment, said, tiny_llama, data_dir, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AdaptiveConfigError) as caught:
        parse_config(settings(tiny_llama, data_dir, tmp_path / "out"))
    assert said in str(caught.value)


def test_llama_board_with_its_panel_spelled_out(tiny_llama, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMABOARD_ENABLED", "1")
    assert parse_config(settings(tiny_llama, data_dir, tmp_path, lora_alpha=8, lora_target="all")).lora_alpha == 8
