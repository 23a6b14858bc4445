"""Fenced blocks of a page, and whether what they show exists: commands, keys, targets, names that are imported."""

import ast
import importlib
import json
import re
import shlex
import tomllib
from dataclasses import fields
from typing import NamedTuple

import yaml

from eval.command_line import build_parser as build_harness_parser
from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.cli.parser import parse_command_line
from tests.helpers.processes import ROOT


_bootstrap.install()
from llamafactory.hparams import parser as host  # noqa: E402

from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402


MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
TRAINING = {field.name for kind in host._TRAIN_ARGS for field in fields(kind)}
USING = {field.name for kind in host._INFER_ARGS for field in fields(kind)}
# What the command that `export` prints, and its remarks for a CPU, are made of.
VLLM = {"--host", "--model", "--served-model-name", "--enable-lora", "--max-lora-rank", "--lora-modules", "--dtype",
        "--enforce-eager", "--port"}  # fmt: skip
DATA = {"dataset": "gsm8k", "dataset_dir": str(ROOT / "examples" / "data")}
FINISHED = {"finetuning_type": "adaptive", "lora_rank": 8, "stage": "sft", "do_train": True,
            "model_name_or_path": "any", "output_dir": "any"}  # fmt: skip


class Fence(NamedTuple):
    """A fenced block, and the comment right before it."""

    mark: str
    language: str
    text: str


def fences(page):
    return [Fence(*found) for found in re.findall(r"(?:<!-- ([^>]*) -->\n)?^```(\w*)\n(.*?)^```$", page, re.S | re.M)]


def commands(script):
    """The commands of a shell script, each as its words; what it writes into files by `<<` is left out."""
    lines, found = iter(script.splitlines()), []
    for line in lines:
        while (words := _words(line)) is None:
            line += "\n" + next(lines)
        if words:
            found.append(words)
        if words and (ends := [word.removeprefix("<<") for word in words if word.startswith("<<")]):
            while next(lines) != ends[0]:
                pass
    return found


def _words(line):
    """The words of a command; None where it goes on in the next line."""
    if line.endswith("\\"):
        return None
    try:
        return shlex.split(line.replace("\\\n", " "), comments=True)
    except ValueError:
        return None


def check_fence(fence):
    """Fail where a block shows something that does not exist."""
    CHECKS[fence.language](fence.text)


def check_script(text):
    for words in commands(text):
        check_command(words)


def check_command(words):
    """Fail where a command is none, or its words are not what it takes."""
    while re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0], re.S):
        words = words[1:]
    name = re.sub(r"^\.venv[\w-]*/bin/", "", words[0])
    PROGRAMS[name](words[1:])


def _make(words):
    assert [word for word in words if "=" not in word and word not in TARGETS] == [], words


def _plugin(words):
    try:
        given = parse_command_line(words)
    except SystemExit as end:
        raise AssertionError(f"llamafactory-adaptive {' '.join(words)}") from end
    _known(getattr(given, "overrides", []), TRAINING)


def _host(words):
    verb, rest = words[0], words[1:]
    known = {"train": TRAINING, "export": USING, "chat": USING, "api": USING}[verb]
    if rest and rest[0].endswith(".yaml"):
        _known(rest[1:], known)
    else:
        assert {word.removeprefix("--") for word in rest if word.startswith("--")} <= known


def _known(overrides, keys):
    assert {word.partition("=")[0] for word in overrides} <= keys, overrides


def _pip(words):
    assert words[0] == "install", words
    for word in words[1:]:
        if extras := re.fullmatch(r"(?:\.|llamafactory-adaptive)\[([\w,]+)\]", word):
            assert set(extras[1].split(",")) <= EXTRAS, word
        elif "==" in word:
            assert word in MAKEFILE, word
        elif "/" in word:
            assert (ROOT / word).is_file(), word


def _python(words):
    if words[:2] == ["-m", "eval.run"]:
        build_harness_parser().parse_args(words[2:])
    elif words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]:
        assert {word for word in words if word.startswith("--")} <= VLLM
        assert words[words.index("--host") + 1] == "127.0.0.1"
    else:
        source = (ROOT / words[0].replace("../", "examples/")).read_text()  # the notebook's folder is below examples/
        assert all(f'"{word}"' in source for word in words if word.startswith("--")), words


def _curl(words):
    assert any(word.startswith("http://127.0.0.1:") for word in words), words
    if "-d" in words:
        json.loads(words[words.index("-d") + 1])


def check_yaml(text):
    """Fail where LLaMA-Factory does not have a key, or the plugin refuses a value."""
    settings = yaml.safe_load(text)
    assert settings.keys() <= TRAINING, settings.keys() - TRAINING
    settings.pop("adaptive_plan", None)  # a file of the reader's own
    parse_config({**FINISHED, **settings, **DATA})


def _diff(text):
    lines = text.splitlines()
    assert all(line[0] in "+-" for line in lines), "lines that stay are not shown"
    check_yaml("\n".join(line[1:] for line in lines if line[0] == "+"))
    assert yaml.safe_load("\n".join(line[1:] for line in lines if line[0] == "-")).keys() <= TRAINING


def check_python(text):
    """Fail where code does not compile, or something it imports does not exist."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []
        elif isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)


CHECKS = {"bash": check_script, "yaml": check_yaml, "diff": _diff, "python": check_python, "": lambda text: None}
PROGRAMS = {
    "make": _make, "llamafactory-adaptive": _plugin, "llamafactory-cli": _host, "pip": _pip, "python": _python,
    "curl": _curl, "cat": lambda words: None, "head": lambda words: None, "source": lambda words: None,
}  # fmt: skip
