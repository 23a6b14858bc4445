"""Evaluations that are killed, doubled, out of disk, behind proxies, or beside a hostile server.

In the harness's own environment, with a small script in vLLM's place.
"""

import json
import os
import random
import resource
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.scene import kill_at, nothing_left_running
from tests.helpers.processes import EVAL_DRIVER, FAKE_SERVER, ROOT
from tests.helpers.replies import replying


NAMED = os.environ.get("LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON")  # set by make faults
PYTHON = Path(NAMED or ROOT / ".venv-eval" / "bin" / "python")
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not NAMED and not PYTHON.exists(), reason="needs .venv-eval: make eval-install"),
]
ROWS = 12


class Evaluation:
    """One run of the harness as a process; ``kill_at`` of the other faults works on it too."""

    def __init__(self, words, log, limit=None, **environment):
        self.log, self.started = log, time.monotonic()
        command = [str(PYTHON), str(EVAL_DRIVER), *map(str, words)]
        bound = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, preexec_fn=bound,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip

    def kill(self):
        ran = self.process.poll() is None
        self.process.kill()
        self.process.wait(30)
        return ran

    def finish(self, code=0):
        exit_code, said = self.process.wait(500), self.log.read_text(errors="replace")
        assert exit_code == code, f"exit code {exit_code}:\n{said[-5000:]}"
        assert "Traceback" not in said, said[-5000:]
        return said


@pytest.fixture(scope="module")
def words(scene):
    """Makes the words of a run: what the fake server is told, where results go, more options."""
    data = scene.root / "rows" / "gsm8k"
    data.mkdir(parents=True)
    for split, count in (("dev", ROWS), ("train", 8)):
        rows = [
            {"question": f"What is {i} plus {i} in {split}?", "answer": f"It is\n#### {2 * i}"} for i in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(out, *more, fake=""):
        return [fake, "--base", scene.base, "--data-dir", data.parent, "--protocol", "llm_adapters", "--tasks",
                "gsm8k", "--concurrency", "1", "--log-samples", "--out", out, *more]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def reference(words, scene):
    """An uninterrupted run: its figures and samples, and the seconds it took."""
    run = Evaluation(words(scene.root / "evaluated", fake="--delay 0.2"), scene.root / "evaluated.log")
    run.finish()
    return figures(scene.root / "evaluated"), time.monotonic() - run.started


def figures(folder):
    document = json.loads((folder / "eval_results.json").read_text())
    return document["scores"], document["means"], (folder / "samples.jsonl").read_text()


@pytest.mark.parametrize("moment", range(8))
def test_kills(moment, words, reference, tell, tmp_path):
    expected, seconds = reference
    asked = tmp_path / "asked"
    told = words(tmp_path / "out", fake=f"--log {asked} --delay 0.2")
    # The beginning is imports: most kills should meet a run that asks.
    begin = random.Random(moment).choice((0.0, 0.5))
    run = Evaluation(told, tmp_path / "log")
    time.sleep(begin * seconds)
    fault = kill_at(run, moment, (1 - begin) * seconds)
    nothing_left_running(str(FAKE_SERVER))
    if not json.loads((tmp_path / "out" / "eval_run.json").read_text() if (tmp_path / "out" / "eval_run.json").exists()
                      else "{}").get("complete"):  # fmt: skip
        Evaluation(told, tmp_path / "log").finish()
    assert figures(tmp_path / "out") == expected
    questions = asked.read_text().splitlines()
    assert len(questions) - len(set(questions)) <= 1, "at most the one under way is asked again"
    tell("evaluation", fault, f"no server left; the same command ended alike, {len(questions)} questions for {ROWS}")


def test_two_at_once(words, reference, tell, tmp_path):
    first = Evaluation(words(tmp_path / "out", fake="--delay 0.2"), tmp_path / "first.log")
    while not (tmp_path / "out" / "eval_run.lock").exists():
        assert first.process.poll() is None
        time.sleep(0.02)
    said = Evaluation(words(tmp_path / "out"), tmp_path / "second.log").finish(2)
    assert "is in use by process" in said
    first.finish()
    assert figures(tmp_path / "out") == reference[0]
    tell("two at once", "a second evaluation in the same folder", "refused in one line, first undisturbed")


def test_a_full_disk(words, reference, tell, tmp_path):
    run = Evaluation(words(tmp_path / "out"), tmp_path / "log", limit=2000)
    said = run.finish(2)
    assert "cannot be written" in said
    Evaluation(words(tmp_path / "out"), tmp_path / "log2").finish()
    assert figures(tmp_path / "out") == reference[0]
    tell("full disk", "an evaluation with files of at most 2000 bytes", "one line, exit 2; with room it went on")


def test_proxies(words, reference, tell, tmp_path):
    with replying((502, {}, b"")) as (proxy, through):
        names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        environment = {**dict.fromkeys(names, proxy), "no_proxy": "", "NO_PROXY": "", "OPENAI_API_KEY": "sk-SECRET-42"}
        Evaluation(words(tmp_path / "out"), tmp_path / "log", **environment).finish()
    assert through == []
    assert figures(tmp_path / "out") == reference[0]
    tell("proxies", "an evaluation with proxies and a key set", "our own server was asked directly and without a key")


HOSTILE = {
    "nothing": b"",
    "a web page": b"<html>" * 1000,
    "null": b"null",
    "an empty list": b"[]",
    "deep nesting": b"[" * 100_000,
    "bytes that are no text": b"\xff\xfe\x00",
    "a length that is none": b'{"data": [{"id": "base", "max_model_len": "abc"}]}',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_server(kind, words, tell, tmp_path):
    with replying((200, {"Content-Type": "application/json"}, HOSTILE[kind])) as (url, _):
        told = words(tmp_path / "out", "--base-url", url)
        said = Evaluation(told, tmp_path / "log", OPENAI_API_KEY="sk-SECRET-42").finish(2)
    assert said.count("eval: error:") == 1
    assert "sk-SECRET-42" not in said
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"sk-SECRET-42" not in path.read_bytes()
    tell("hostile server", f"--base-url to a server that answers {kind}", "one line, exit 2, no secret written")
