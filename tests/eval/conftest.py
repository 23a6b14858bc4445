import json
import socket

import pytest

from tests.eval.harness import Harness
from tests.helpers.jsonl import write_jsonl


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def rows(tmp_path):
    """Local data for every task: five rows each, eight training rows for GSM8K."""
    data = tmp_path / "data"
    sums = [{"question": f"What is {i} plus {i + 1} in words and figures?", "answer": f"It is\n#### {2 * i + 1}"}
            for i in range(13)]  # fmt: skip
    write_jsonl(data / "gsm8k" / "dev.jsonl", sums[:5])
    write_jsonl(data / "gsm8k" / "train.jsonl", sums[5:])
    write_jsonl(data / "boolq" / "dev.jsonl", [{"question": f"is {i} odd?", "answer": i % 2 == 1,
                                                "passage": f"Number {i} is here."} for i in range(5)])  # fmt: skip
    for name in ("arc_easy", "arc_challenge"):
        choices = {"text": ["sun", "moon", "grey sea"], "label": ["A", "B", "C"]}
        write_jsonl(data / name / "dev.jsonl", [{"question": f"Which one is number {i}?", "choices": choices,
                                                 "answerKey": "ABC"[i % 3]} for i in range(5)])  # fmt: skip
    write_jsonl(data / "aqua" / "dev.jsonl", [
        {"question": f"What is {i} x 2?", "options": [f"A){2 * i}", "B)90", "C)91", "D)92", "E)93"], "rationale": "",
         "correct": "A"} for i in range(5)])  # fmt: skip
    write_jsonl(data / "aqua" / "agieval.jsonl", [  # the same five, as AGIEval publishes the set
        {"query": f"Q: What is {i} x 2? Answer Choices: (A){2 * i} (B)90 (C)91 (D)92 (E)93\n"
                  "A: Among A through E, the answer is",
         "choices": [f"(A){2 * i}", "(B)90", "(C)91", "(D)92", "(E)93"], "gold": [0]} for i in range(5)])  # fmt: skip
    write_jsonl(data / "copa" / "dev.jsonl", [
        {"premise": f"The man counted to {i}.", "choice1": "He was bored.", "choice2": "He slept.",
         "question": ("cause", "effect")[i % 2], "label": i % 2} for i in range(5)])  # fmt: skip
    return data


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a merged model to the checks before the start."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"r": 12, "lora_alpha": 24, "rank_pattern": {"model.layers.0.q_proj": 40}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").touch()
    return folder


@pytest.fixture
def harness(tiny_llama, rows, tmp_path):
    return Harness(tiny_llama, rows, tmp_path)
