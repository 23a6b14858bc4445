"""What the callback of a run in LLaMA-Factory adds: ranks for the host's adapter, and the end of the run."""

import json
import shlex
from pathlib import Path

import pytest
from llamafactory.hparams.parser import _parse_infer_args

from llamafactory_adaptive.bridge.arguments import adapter_to_go_on_with
from llamafactory_adaptive.bridge.host_callback import HostCallback
from llamafactory_adaptive.bridge.host_run import chat_command
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.files import LOG_FILE
from llamafactory_adaptive.training.bound_run import RunRequest
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.run_log import RunLog
from tests.helpers.plans import found_plan


@pytest.fixture
def ended(monkeypatch):
    """The callback of a run whose saved adapter is right, and the folders that were checked."""
    checked = []
    monkeypatch.setattr(PlanGuard, "verify_saved", lambda self, output: checked.append(output))
    return HostCallback(PlanGuard(found_plan(), RunLog("igu", 0.0)), RunRequest(3)), checked


def test_a_run_whose_ranks_did_not_reach_the_host_does_not_end_well(ended, tmp_path, capsys):
    callback, checked = ended
    with pytest.raises(GuardError, match=r"no allocation reached the model: configs_injected=0, modules_checked=0"):
        callback.finish(tmp_path, loads_adapter=False, chat="talk", training={})
    assert (checked, capsys.readouterr().out) == ([], "")


@pytest.mark.parametrize("loads_adapter", [True, False])
def test_a_run_ends_with_its_words_if_its_ranks_were_handed_over_or_trained_before(
    ended, tmp_path, capsys, loads_adapter
):
    callback, checked = ended
    if not loads_adapter:
        callback.lora_arguments()
    callback.guard.log.warn("mind this")
    callback.finish(tmp_path, loads_adapter, "talk", {"learning_rate": 0.5})
    said = capsys.readouterr().out
    assert said.count(f"Adaptive ranks ({found_plan().method})") == said.count("warning: mind this") == 1
    assert checked == [tmp_path]
    line = json.loads((tmp_path / LOG_FILE).read_text())
    assert (line["event"], line["overhead"], line["seconds"] > 0) == ("end", {"planning": 0.0}, True)
    assert line["training"] == {"learning_rate": 0.5}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"adapter_name_or_path": "first,last"}, Path("last")),
        ({"adapter_name_or_path": "first", "create_new_adapter": True}, None),
    ],
    ids=["none", "several", "merged"],
)
def test_a_trained_adapter_is_gone_on_with_unless_it_is_merged(settings, expected):
    assert adapter_to_go_on_with(settings) == expected


@pytest.mark.parametrize(
    ("settings", "adapters"),
    [
        ({}, ["my out"]),
        ({"adapter_name_or_path": "first,last"}, ["first", "my out"]),
        ({"adapter_name_or_path": "first,last", "create_new_adapter": True}, ["first", "last", "my out"]),
    ],
    ids=["none", "several", "merged"],
)
def test_the_command_that_talks_to_the_adapter_is_one_that_the_host_reads(settings, adapters):
    of_the_base = {"model_name_or_path": "a/base", "template": "qwen", "quantization_bit": 4, "lora_rank": 8}
    program, what, *words = shlex.split(chat_command({**of_the_base, **settings, "output_dir": "my out"}))
    assert (program, what) == ("llamafactory-cli", "chat")
    model, data, finetuning, _ = _parse_infer_args(words)
    assert (model.model_name_or_path, model.adapter_name_or_path, data.template) == ("a/base", adapters, "qwen")
    assert (model.quantization_bit, finetuning.finetuning_type) == (4, "lora")


def test_the_command_that_talks_to_the_adapter_leaves_out_what_the_run_left_out():
    args = {"model_name_or_path": "a/base", "output_dir": "out", "trust_remote_code": False}
    assert chat_command(args) == "llamafactory-cli chat --model_name_or_path a/base --adapter_name_or_path out"
