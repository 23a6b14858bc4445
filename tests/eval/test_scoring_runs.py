"""Whole runs through lm-evaluation-harness: which rows are scored, what is stripped, and what a run is good for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.jsonl import write_jsonl
from tests.helpers.processes import EVAL_DRIVER, ROOT


NAMED = os.environ.get("LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON")  # set by make eval-test: missing is then a failure
PYTHON = Path(NAMED or ROOT / ".venv-eval" / "bin" / "python")
pytestmark = [
    pytest.mark.eval_env,
    pytest.mark.skipif(not NAMED and not PYTHON.exists(), reason="needs .venv-eval: make eval-install"),
]


@pytest.fixture
def run(tiny_llama, model, tmp_path):
    def make(data, *more, out="out", protocol="llm_adapters", tasks="gsm8k", expect=0):
        words = ["--base", tiny_llama, "--merged", f"mine={model}", "--data-dir", data, "--out", tmp_path / out,
                 "--protocol", protocol, "--tasks", tasks, "--log-samples", *more]  # fmt: skip
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [PYTHON, EVAL_DRIVER, "", *map(str, words)], capture_output=True, text=True, env=env, cwd=ROOT
        )
        assert done.returncode == expect, done.stdout[-3000:] + done.stderr[-6000:]
        assert "Traceback" not in done.stderr
        return done

    return make


def results_of(folder):
    return json.loads((folder / "eval_results.json").read_text())


def samples_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("protocol", ["lm_eval", "llm_adapters"])
def test_the_file_that_is_digested_is_the_file_that_is_scored(protocol, run, tmp_path):
    """A folder whose name is a pattern for another one, and a question that looks like a date."""
    for name, answer in (("set[1]", "111"), ("set1", "999")):
        for split in ("dev", "train"):
            rows = [{"question": f"2020-01-0{i}", "answer": f"#### {answer}"} for i in range(1, 8)]
            write_jsonl(tmp_path / name / "gsm8k" / f"{split}.jsonl", rows)
    run(tmp_path / "set[1]", "--limit", 2, protocol=protocol)
    samples = samples_of(tmp_path / "out")
    assert {(s["target"], s["question"]) for s in samples} == {("#### 111", "2020-01-01"), ("#### 111", "2020-01-02")}
    assert "999" not in samples[0]["prompt"]


def test_every_metric_of_a_run_is_that_of_our_own_readers(rows, run, tmp_path):
    """What lm-evaluation-harness computed, row by row, against the functions that the tests of extraction check."""
    sys.path.insert(0, str(ROOT))
    from eval import extraction

    run(rows, protocol="lm_eval")
    for sample in samples_of(tmp_path / "out"):
        text, target, metrics = sample["response"], sample["target"], sample["metrics"]
        assert metrics["exact_match,strict-match"] == extraction.matches(extraction.strict(text), target)
        assert metrics["exact_match,flexible-extract"] == extraction.matches(extraction.flexible(text), target)
        right = extraction.final_value(text) == extraction.label_of(target)
        assert metrics["exact_match,training-format"] == right


def test_conditions_are_judged_after_the_results_are_written(rows, run, tmp_path):
    done = run(rows, "--fail-under", "gsm8k=100", expect=3)
    assert "eval: failed: mine has" in done.stderr
    assert results_of(tmp_path / "out")["scores"]
    done = run(rows, "--fail-under", "mean=0", "--fail-if-worse-than", "base", out="passed")  # both answer alike
    assert "failed" not in done.stderr
    done = run(rows, "--fail-under", "gsm9k=1", out="refused", expect=2)
    assert "'gsm9k' is not asked" in done.stderr
    assert "starting" not in done.stdout


def test_folders_of_runs_are_compared_and_browsed(rows, run, tmp_path):
    """The comparison of two folders is that of one run; another decoding is refused."""
    for out in ("one", "two"):
        run(rows, out=out, tasks="gsm8k,boolq")
    run(rows, "--strip-thinking", out="three", tasks="gsm8k,boolq")
    words = [PYTHON, "-m", "eval.compare", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both.json"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    both, one = json.loads((tmp_path / "both.json").read_text()), results_of(tmp_path / "one")
    pair = next(c for c in both["comparisons"] if (c["first"], c["second"]) == ("one:base", "two:mine"))
    assert pair["mean_difference"] == one["comparisons"][0]["mean_difference"]
    assert pair["tasks"] == one["comparisons"][0]["tasks"]
    words[4] = tmp_path / "three"
    done = subprocess.run([*words[:-1], tmp_path / "x.json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "decoding differs" in done.stderr
    assert "samples.html" in {path.name for path in (tmp_path / "one").iterdir()}
