"""Tutorial and notebook as readers run them, on a tiny model in the place of SmolLM2, which no network brings here.

`tests/contract/test_shown_commands.py` parses every command of theirs, also those that need a server.
"""

import os
import re
import shutil
import subprocess

import pytest

from tests.helpers.commands import BIN, EXAMPLES
from tests.helpers.processes import ROOT
from tests.helpers.shown_commands import fences
from tests.helpers.tiny import save_tiny, tiny_tokenizer


# Each command of theirs has tests of its own.
pytestmark = [pytest.mark.slow, pytest.mark.repeats, pytest.mark.timeout(1800)]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
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
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "(uniform LoRA of rank 8)" in done.stdout
    told = "".join(fence.text for fence in fences(PAGE) if fence.mark or "--dry-run" in fence.text)
    made = set(re.findall(r"\btutorial/[\w/.]*\w", PAGE)) - set(re.findall(r"--out (tutorial/\w+)", told))
    assert {path for path in made if not (tmp_path / path).exists()} == set()


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
