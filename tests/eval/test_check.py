"""``eval.check`` and ``eval.rows`` in the harness's own environment, against a run of it."""

import json
import os
import subprocess

from tests.eval.harness import PYTHON, needs_environment
from tests.helpers.processes import ROOT


pytestmark = needs_environment


def answer(module, *words):
    done = subprocess.run([PYTHON, "-m", module, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_check_knows_the_rows_that_a_run_scores_and_rows_are_its_figures(harness, tmp_path):
    asked = ["--base", harness.base, "--data-dir", harness.rows, "--protocol", "llm_adapters", "--limit", "4",
             "--tasks", "gsm8k,copa"]  # fmt: skip
    facts = answer("eval.check", *asked, "--out", tmp_path / "out")
    assert {name: task["questions"] for name, task in facts["tasks"].items()} == {"gsm8k": 4, "copa": 4}
    rows = [json.loads(line) for line in (harness.rows / "copa" / "dev.jsonl").read_text().splitlines()[:4]]
    right = [row["label"] for row in rows]
    assert facts["tasks"]["copa"]["commonest_share"] == max(right.count(0), right.count(1)) / 4
    assert facts["tasks"]["gsm8k"]["commonest_share"] is not None, "four solutions are few choices"
    assert not (tmp_path / "out").exists()
    harness.run("--limit", "4", "--log-samples", tasks="gsm8k,copa")
    made = harness.results()
    assert facts["settings"]["scored"] == {name: rows["scored_sha256"] for name, rows in made["data"]["sets"].items()}
    assert facts["versions"].items() >= {k: v for k, v in made["versions"].items() if k != "vllm"}.items()
    values = answer("eval.rows", tmp_path / "out")["answers"]["base"]
    for score in made["scores"]:
        if score["headline"]:
            held = values[score["task"]]
            assert (held["metric"], len(held["values"]), held["n_cut"]) == (
                score["metric"],
                score["n"],
                score["n_cut"],
            )
            assert sum(held["values"]) / len(held["values"]) == score["value"]
