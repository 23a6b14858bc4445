"""What README, tutorial, skill and notebook tell readers to type exists: commands, keys, targets, imports.

`tests/e2e/test_tutorial.py` runs tutorial and notebook from end to end.
"""

import json
import re

import pytest
import yaml

from tests.helpers.processes import ROOT
from tests.helpers.shown_commands import (
    Fence,
    check_command,
    check_fence,
    check_python,
    check_script,
    commands,
    fences,
)


SKILL = "skills/llamafactory-adaptive/SKILL.md"
PAGES = ("README.md", "README_zh.md", "docs/tutorial.md", "docs/versioning.md", SKILL)
FENCES = {
    f"{page} {index} {fence.language}": fence
    for page in PAGES
    for index, fence in enumerate(fences((ROOT / page).read_text(encoding="utf-8")), start=1)
}
SERVERS = ("vllm.entrypoints", "llamafactory-cli api", "curl", "eval.run")


@pytest.mark.parametrize("fence", FENCES.values(), ids=FENCES.keys())
def test_what_a_block_shows_exists(fence):
    check_fence(fence)


def test_blocks_of_the_tutorial_that_need_a_server_say_so_and_no_others():
    for fence in fences((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        needs = fence.language == "bash" and any(words in fence.text for words in SERVERS)
        marks = ("a server: started by a test of its own", "vLLM: parsed by the tests, not started")
        assert (fence.mark in marks) is needs


NOTEBOOK = json.loads((ROOT / "examples" / "notebooks" / "adaptive_ranks_smollm2.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_cells_of_the_notebook_compile_and_their_commands_exist():
    for cell in CODE:
        check_python(cell)
    ran = re.findall(r'^run\("(.*)"\)$', "\n".join(CODE), re.MULTILINE)
    assert {words.split()[1] for words in ran} >= {"plan", "train", "report", "export"}
    for words in ran:
        check_script(words.partition(" > ")[0])
    told = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    for fence in fences(told):
        check_fence(fence)


def test_the_notebook_was_run_whole_and_shows_nothing_of_the_machine():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    shown = "".join("".join(output.get("text") or output["data"]["text/plain"]) for output in outputs)
    assert "trainable parameters" in shown
    paths, hosts = r"(?<![\w.<])/[a-z]\w+", r"\b(?!127\.0\.0\.1\b)\d+\.\d+\.\d+\.\d+\b|\w+@\w+"
    assert re.findall(f"{paths}|{hosts}", shown) == []


def test_the_skill_says_in_its_head_what_it_is_for():
    _, head, _ = (ROOT / SKILL).read_text(encoding="utf-8").split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["name"] == (ROOT / SKILL).parent.name
    assert 100 < len(told["description"]) <= 1024


def test_commands_are_told_apart():
    script = "a 'b\nc' # d\n\ncat > f <<'END'\nnot a command\nEND\ne \\\n  f\n"
    assert commands(script) == [["a", "b\nc"], ["cat", ">", "f", "<<END"], ["e", "f"]]


@pytest.mark.parametrize(
    "words",
    [
        "make nothing",
        "llamafactory-adaptive plam my.yaml",
        "llamafactory-adaptive plan my.yaml lora_rnk=8",
        "llamafactory-cli train my.yaml lora_rnk=8",
        "llamafactory-cli chat --model_nam x",
        "pip install .[nothing]",
        "pip install -c constraints/none.txt .",
        "python examples/none.py",
        "python examples/demo/smollm2.py --nothing",
        "python -m vllm.entrypoints.openai.api_server --host 0.0.0.0 --model x",
        "python -m eval.run --nothing",
        "curl http://127.0.0.1:8000 -d {",
        "rm -rf x",
    ],
)
def test_a_command_that_does_not_exist_is_found(words):
    with pytest.raises((AssertionError, KeyError, SystemExit, OSError, ValueError)):
        check_command(words.split())


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("yaml", "lora_rnk: 8"),
        ("yaml", "adaptive_min_rank: -1"),
        ("diff", "-finetuning_type: lora\n+finetuning_typ: adaptive"),
        ("python", "from llamafactory_adaptive import plan_rnks"),
        ("python", "plan = ("),
        ("toml", ""),
    ],
)
def test_a_block_that_is_wrong_is_found(language, text):
    from llamafactory_adaptive.errors import AdaptiveError

    with pytest.raises((AssertionError, KeyError, SyntaxError, AdaptiveError)):
        check_fence(Fence("", language, text))
