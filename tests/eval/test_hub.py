"""What comes from the hub or from others: a name means one commit all through a run, a bad tokenizer is one line."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from eval.errors import EvalError
from eval.hub import check_tokenizers
from tests.helpers.processes import ROOT


# Claims the folder as a run does, then fetches what loading a tokenizer would.
RUN = """
import sys
from eval.arguments import parse
from eval.asking import settings_of
from eval.errors import EvalError
from eval.output import OutputFolder
request = parse(sys.argv[1:])
try:
    with OutputFolder(request.out) as folder:
        print("goes on" if folder.claim(settings_of(request, {})) else "begins")
        from huggingface_hub import hf_hub_download
        hf_hub_download("some/model", "tokenizer_config.json")
except EvalError as error:
    print(error)
"""


class Hub(BaseHTTPRequestHandler):
    commit = "a" * 40

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        known = "/some/model/resolve/" in self.path
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", "2")
        self.send_header("ETag", '"0123"')
        self.send_header("X-Repo-Commit", Hub.commit)
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"{}")


@pytest.fixture
def run(rows, tmp_path):
    """Begin a run of a hub's model in a process of its own; a hub that is down answers nobody."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inherited = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}

    def start(commit, down=False, base="some/model"):
        Hub.commit = commit
        home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}
        address = "http://127.0.0.1:9" if down else f"http://127.0.0.1:{server.server_port}"
        words = ["--base", base, "--protocol", "llm_adapters", "--data-dir", str(rows), "--tasks", "gsm8k"]
        done = subprocess.run(
            [sys.executable, "-c", RUN, *words, "--out", str(tmp_path / "out")], text=True, capture_output=True,
            cwd=ROOT, env={**inherited, **home, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}, check=True,
            timeout=120)  # fmt: skip
        return done.stdout.strip()

    yield start
    server.shutdown()
    server.server_close()


def test_a_run_of_a_hubs_model_goes_on_from_an_empty_cache(run):
    assert run("a" * 40) == "begins"
    assert run("a" * 40) == "goes on"
    assert run("a" * 40, down=True) == "goes on"  # from the local cache
    assert "it differs in models" in run("b" * 40)  # answers of two commits are not one run


def test_a_name_that_nobody_knows_is_one_line(run):
    said = run("a" * 40, base="other/model")
    assert said.startswith("--base other/model: there is no such folder, and neither the hub nor its local cache has")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
    ids=lambda text: text[:30],
)
def test_a_tokenizer_of_others_that_breaks_the_library_is_one_line(file, text, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / file).write_text(text)
    with pytest.raises(EvalError) as caught:
        check_tokenizers([str(tmp_path)], "none")
    assert str(caught.value).startswith(f"the tokenizer of {tmp_path} cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_an_error_without_words_is_told_by_its_kind(monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(EvalError, match="the tokenizer of x cannot be loaded: OSError; give a folder"):
        check_tokenizers(["x"], "none")
