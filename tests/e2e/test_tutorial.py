"""Tutorial and notebook as readers run them, on a tiny model in the place of SmolLM2, which no network brings here.

`tests/contract/test_shown_commands.py` parses every command of theirs, also those that need vLLM.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.helpers.board import free_port
from tests.helpers.commands import BIN, EXAMPLES
from tests.helpers.processes import ROOT
from tests.helpers.shown_commands import fences
from tests.helpers.tiny import save_tiny, tiny_tokenizer


# Each command of theirs has tests of its own.
pytestmark = [pytest.mark.slow, pytest.mark.repeats, pytest.mark.timeout(1800)]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
WITH_COMMANDS = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_stand_in(folder):
    """A model with the tokens of SmolLM2's template; `smollm2.py` takes it for one that it has built already."""
    save_tiny(folder, vocab_size=264, max_position_embeddings=1024)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def test_the_tutorial_runs_as_it_is_written(tmp_path):
    (tmp_path / "examples").symlink_to(EXAMPLES)
    save_stand_in(tmp_path / "tutorial" / "model")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    shown = [fence.text for fence in fences(PAGE) if fence.language == "bash" and not fence.mark]
    script = "\n".join(['make() { echo "make $*"; }', *shown])
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=tmp_path,
        input="How many?\nexit\n",
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # a model of random weights answers in random bytes
        env=WITH_COMMANDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "(uniform LoRA of rank 8)" in done.stdout
    told = "".join(fence.text for fence in fences(PAGE) if fence.mark or "--dry-run" in fence.text)
    made = set(re.findall(r"\btutorial/[\w/.]*\w", PAGE)) - set(re.findall(r"--out (tutorial/\w+)", told))
    assert {path for path in made if not (tmp_path / path).exists()} == set()


def wait_for_words(words, log, process, seconds=300.0):
    deadline = time.monotonic() + seconds
    while words not in log.read_text(encoding="utf-8", errors="replace"):
        assert process.poll() is None, log.read_text(encoding="utf-8", errors="replace")[-6000:]
        assert time.monotonic() < deadline, f"{words!r} is not in {log}"
        time.sleep(0.2)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_server_of_the_tutorial_answers_the_request_beside_it_and_ends_with_ctrl_c(tmp_path):
    port = str(free_port())
    serve, ask = (fence.text.replace("8000", port) for fence in fences(PAGE) if fence.mark.startswith("a server"))
    save_stand_in(tmp_path / "tutorial" / "merged")
    where = {"cwd": tmp_path, "env": WITH_COMMANDS}
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(["bash", "-c", serve], stdout=log, stderr=log, start_new_session=True, **where)
    try:
        wait_for_words("Uvicorn running on", tmp_path / "server.log", server)
        done = subprocess.run(["bash", "-c", ask], capture_output=True, check=True, timeout=300, **where)
        answer = json.loads(done.stdout)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert 0 < answer["usage"]["completion_tokens"] <= 64
        os.killpg(server.pid, signal.SIGINT)
        server.wait(60)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_the_notebook_runs_as_it_is_saved(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    shutil.copytree(EXAMPLES / "demo", tmp_path / "demo")
    save_stand_in(folder / "notebook_output" / "model")
    notebook = nbformat.read(EXAMPLES / "notebooks" / "adaptive_ranks_smollm2.ipynb", as_version=4)
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    assert (folder / "notebook_output" / "merged" / "config.json").is_file()
