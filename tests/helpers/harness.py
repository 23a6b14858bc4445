"""An environment of the harness without vLLM, and rows of two tasks."""

import json
import shlex
import sys
from pathlib import Path

from tests.helpers.jsonl import write_jsonl


FAKE_HARNESS = Path(__file__).with_name("fake_harness.py")
TASKS = {"boolq": 40, "arc_easy": 30}


def fake_environment(folder):
    """Make a program that runs the harness as the Python of its environment would; and the folder that steers it."""
    state, python = folder / "state", folder / "environment" / "python"
    state.mkdir(parents=True)
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(FAKE_HARNESS), str(state)])} "$@"\n')
    python.chmod(0o755)
    return python, state


def task_rows(folder):
    """Write rows of two tasks, as the harness reads them."""
    boolq = [{"question": f"is {i} odd?", "answer": i % 2 == 1, "passage": f"{i}"} for i in range(TASKS["boolq"])]
    choices = {"text": ["sun", "moon", "sea"], "label": ["A", "B", "C"]}
    arc = [{"question": f"Which is {i}?", "choices": choices, "answerKey": "A"} for i in range(TASKS["arc_easy"])]
    write_jsonl(folder / "boolq" / "dev.jsonl", boolq)
    write_jsonl(folder / "arc_easy" / "dev.jsonl", arc)
    return folder


def save_adapter(folder, rank=4):
    """Make a folder that looks like a saved adapter to the harness's checks."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "lora_alpha": 2 * rank}))
    (folder / "adapter_model.safetensors").touch()
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []
