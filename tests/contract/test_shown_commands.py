"""What README, tutorial, skill and notebook tell readers to type exists: commands, keys, targets, imports.

`tests/e2e/test_tutorial.py` runs tutorial and notebook from end to end.
"""

import re

import pytest

from tests.helpers.processes import ROOT
from tests.helpers.shown_commands import Fence, check_command, check_fence, commands, fences


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
        assert bool(re.fullmatch(r"(a server|vLLM): parsed by the tests, not started", fence.mark)) is needs


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
