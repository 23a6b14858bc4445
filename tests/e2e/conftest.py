"""Rows and settings of the comparisons."""

import json

import pytest

from llamafactory_adaptive.bridge import comparison
from llamafactory_adaptive.bridge.comparison_jobs import decode_job, encode_job
from tests.helpers.tiny import settings


COUNT = 96
WORDS = ["one", "two", "three", "four", "red", "blue", "sun", "moon"]


@pytest.fixture(scope="module")
def comparison_data(tmp_path_factory):
    """Rows that are all different: the answer says the question's words in reverse."""
    folder = tmp_path_factory.mktemp("rows")
    questions = [[WORDS[(index >> shift) % 8] for shift in (0, 3, 6)] for index in range(COUNT)]
    rows = [{"instruction": " ".join(words), "input": "", "output": " ".join(words[::-1])} for words in questions]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "few.json").write_text(json.dumps(rows[:12]))
    (folder / "twice.json").write_text(json.dumps(rows[:50] * 2))
    (folder / "many.json").write_text(json.dumps([{**rows[0], "output": str(number)} for number in range(300)]))
    names = {name: {"file_name": f"{name}.json"} for name in ("rows", "few", "twice", "many")}
    (folder / "dataset_info.json").write_text(json.dumps(names))
    return folder


@pytest.fixture
def yaml_settings(tiny_llama, comparison_data, tmp_path):
    kept = settings(tiny_llama, comparison_data, tmp_path / "unused", dataset="rows", max_steps=4)
    return {key: value for key, value in kept.items() if not key.startswith("adaptive_")} | {"finetuning_type": "lora"}


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the jobs here, as their processes would; the jobs that were run."""
    jobs = []

    def run(job, device, log, children):
        jobs.append(decode_job(encode_job(job)))
        return jobs[-1].run()

    monkeypatch.setattr(comparison, "run_in_own_process", run)
    return jobs
