"""What goes wrong in the scoring process: one line that names it, with its log, and never the host's traceback."""

import json
import re

import pytest
import torch
from accelerate import PartialState

from llamafactory_adaptive.bridge import measure_process
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.host_loading import LESS_MEMORY
from llamafactory_adaptive.bridge.scoring_job import ScoringJob, scoring_settings
from llamafactory_adaptive.bridge.validation import parse_config
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.methods.sensitivity import Sensitivity, SensitivityOptions
from tests.helpers.tiny import settings


LESS_MEMORY_WORDS = re.escape(LESS_MEMORY)


@pytest.fixture(autouse=True)
def _one_process():
    """What the host's parser keeps of devices for a whole process goes with the test."""
    yield
    PartialState._reset_state()


def load(model, data, output, **more):
    args = settings(model, data, output, **more)
    return measure_process.load(scoring_settings(args), parse_config(args))


def refusal(*where, **more):
    with pytest.raises(CalibrationError) as caught:
        load(*where, **more)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has\na total capacity of 1 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("unable to mmap 99 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu", "mmap", "python"])
def test_memory_that_runs_out_while_the_model_loads(error, tiny_llama, data_dir, tmp_path, monkeypatch):
    def load_model(*args, **kwargs):
        raise error

    monkeypatch.setattr("llamafactory.model.load_model", load_model)
    said = refusal(tiny_llama, data_dir, tmp_path / "out")
    assert re.fullmatch(
        rf"the model {tiny_llama} cannot be loaded for scoring \(memory ran out: {LESS_MEMORY_WORDS}\)", said
    )


def test_a_model_that_does_not_load_for_another_reason(tiny_llama, data_dir, tmp_path, monkeypatch):
    def load_model(*args, **kwargs):
        raise ValueError("no such layer\nand more of it")

    monkeypatch.setattr("llamafactory.model.load_model", load_model)
    said = refusal(tiny_llama, data_dir, tmp_path / "out")
    assert said == f"the model {tiny_llama} cannot be loaded for scoring (ValueError: no such layer)"


ROWS = [{"instruction": "say", "input": "", "output": "so"}] * 12
BROKEN = {
    "wrong columns": (
        json.dumps(ROWS),
        {"columns": {"prompt": "question", "response": "answer"}},
        "KeyError: 'question'",
    ),
    "cut off": (json.dumps(ROWS)[:300], {}, "DatasetGenerationError"),
    "no rows": ("[]", {}, "ValueError: "),
    "text": ("these are no rows", {}, "DatasetGenerationError"),
}


@pytest.mark.parametrize(("text", "entry", "cause"), BROKEN.values(), ids=BROKEN)
def test_a_data_set_that_cannot_be_read(text, entry, cause, tiny_llama, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(text)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "rows.json", **entry}}))
    said = refusal(tiny_llama, tmp_path, tmp_path / "out", dataset="mine")
    assert said.startswith(f"the data set mine cannot be read for scoring ({cause}")
    assert "Traceback" in capsys.readouterr().out, "the whole story goes to the log"


# -- the process itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def score(tiny_llama, data_dir, tmp_path, monkeypatch):
    """Have scores measured by a shell script in the place of the scoring process."""
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path / "cache"))

    def run(script):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        monkeypatch.setattr(measure_process.sys, "executable", str(program))
        args = settings(tiny_llama, data_dir, tmp_path / "out")
        measurement = Sensitivity(SensitivityOptions()).measurement()
        job = ScoringJob.from_run(
            CheckedRun(args, args, parse_config(args)), ["lm_head"], measurement, tmp_path / "empty" / "statistics"
        )
        with pytest.raises(CalibrationError) as caught:
            measure_process.measure_in_own_process(job)
        [log] = (tmp_path / "cache" / "logs").iterdir()
        return str(caught.value), log

    (tmp_path / "empty").mkdir()
    return run


def test_a_process_that_was_killed_ran_out_of_memory_as_a_rule(score):
    said, log = score("echo Loading weights; echo '  shard 2 of 9  '; echo; kill -9 $$")
    assert said == (
        f"the scoring process was killed, as a rule because memory ran out: {LESS_MEMORY}; its last "
        f"line: shard 2 of 9 (the whole log: {log})"
    )
    assert log.read_text().startswith("Loading weights\n")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo aborted in native code; kill -6 $$", "was ended by signal 6; its last line: aborted in native code"),
        ("echo first; echo last; exit 7", "ended with exit code 7; its last line: last"),
        ("exit 1", "ended with exit code 1"),
    ],
)
def test_a_process_that_crashed_tells_how_and_its_last_line(script, said, score):
    message, log = score(script)
    assert message == f"the scoring process {said} (the whole log: {log})"


def test_a_process_that_says_what_is_wrong_is_quoted(score):
    message, log = score("""printf '{"error": "no rows at all"}' > "$4"; echo noise; exit 2""")
    assert message == f"no rows at all (the scoring process's whole log: {log})"
