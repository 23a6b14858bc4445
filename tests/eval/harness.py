"""Whole runs of the harness in its own environment, with a small script in vLLM's place."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import EVAL_DRIVER, FAKE_SERVER, ROOT, processes_naming


NAMED = os.environ.get("LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON")  # set by make eval-test: missing is then a failure
PYTHON = Path(NAMED or ROOT / ".venv-eval" / "bin" / "python")
needs_environment = [
    pytest.mark.eval_env,
    pytest.mark.skipif(not NAMED and not PYTHON.exists(), reason="needs .venv-eval: make eval-install"),
]
ALL = "gsm8k,boolq,arc_easy,arc_challenge,aqua,copa"


class Harness:
    """Runs the driver on local rows and a tiny model's folder."""

    def __init__(self, base, rows, out):
        self.base, self.rows, self.out = base, rows, out

    def words(self, *more, fake="", protocol="llm_adapters", tasks=ALL, out="out"):
        driver = [str(PYTHON), str(EVAL_DRIVER), fake, "--base", str(self.base), "--data-dir", str(self.rows)]
        return [*driver, "--protocol", protocol, "--tasks", tasks, "--out", str(self.out / out), *map(str, more)]

    def start(self, *more, **settings):
        env, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
        words = self.words(*more, **settings)
        return subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=env, cwd=ROOT)

    def run(self, *more, expect=0, **settings):
        told = self.finished(self.start(*more, **settings), expect)
        assert not processes_naming(str(FAKE_SERVER))
        return told

    def finished(self, process, expect=0):
        out, err = process.communicate(timeout=120)
        assert process.returncode == expect, out[-3000:] + err[-6000:]
        assert "Traceback" not in err
        return out, err

    def results(self, out="out"):
        return json.loads((self.out / out / "eval_results.json").read_text())

    def samples(self, out="out"):
        return [json.loads(line) for line in (self.out / out / "samples.jsonl").read_text().splitlines()]
