"""The command line of ``python -m eval.run``, checked as a whole before anything starts."""

import argparse
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eval import gates, output, server_words
from eval.command_line import DEFAULT_TASKS, build_parser
from eval.contamination import files_of_plan
from eval.data import check_files, local_files
from eval.decoding import Decoding, Prompting
from eval.errors import UsageError
from eval.models import BASE, LONGEST_NAME, Model, problem_with
from eval.protocols import Task, load_tasks, with_fewshot
from eval.server import ServerOptions
from eval.transport import Patience


_LARGEST_SEED = 2**32 - 1  # NumPy's
# Arguments of a chat template that the harness sets itself.
_TEMPLATE_OURS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_tensors",
                  "return_dict", "padding", "truncation", "max_length")  # fmt: skip


@dataclass(frozen=True)
class Request:
    """Settings of one evaluation, validated as far as possible without loading or starting anything.

    Attributes:
        base_row: whether the base is evaluated too, or only carries the adapters.
        base_tokenizer: folder or hub name of the tokenizer that stands in for the base's own; None for its own.
        files: the local files of each task, by split; None to read rows from the hub.
        url: address of a server that runs already; None to start one.
    """

    models: tuple[Model, ...]
    tasks: tuple[Task, ...]
    protocol: str
    template: str
    limit: int | None
    seeds: tuple[int, ...]
    decoding: Decoding
    prompting: Prompting
    base_row: bool
    base_tokenizer: str | None
    concurrency: int
    patience: Patience
    files: dict[str, dict[str, Path]] | None
    split: str
    seen_files: tuple[Path, ...]
    url: str | None
    server: ServerOptions
    out: Path
    log_samples: bool
    strip_thinking: bool
    gates: gates.Gates


def parse(argv: Sequence[str] | None = None) -> Request:
    """Parse the command line into a validated request.

    Raises:
        UsageError: settings are wrong; it holds all problems at once.
    """
    given = build_parser().parse_args(argv)
    problems: list[str] = [*_range_problems(given), *_setting_problems(given), *_address_problems(given)]
    problems += server_words.problems(given.server_args)
    problems += _path_problems(given)
    models, model_problems = _models(given)
    problems += model_problems
    options, option_problems = _template_options(given.chat_template_kwargs)
    problems += option_problems
    tasks: list[Task] = []
    files: dict[str, dict[str, Path]] | None = None
    seen: list[Path] = list(given.train_file)
    try:
        tasks = load_tasks(given.protocol, [name for name in given.tasks.split(",") if name])
        if given.num_fewshot is not None and given.num_fewshot >= 0:
            tasks = [with_fewshot(task, given.num_fewshot) for task in tasks]
        files = _files(given, tasks)
        seen += files_of_plan(given.plan, given.dataset_dir) if given.plan else []
    except UsageError as error:
        problems += error.problems
    conditions, gate_problems = gates.parse(
        given, [model.name for model in models], [task.name for task in tasks], not given.no_base_row
    )
    problems += gate_problems if tasks else []
    if tasks and all(task.likelihood for task in tasks):
        problems += _idle_problems(given)
    if problems:
        raise UsageError(problems)
    return Request(
        models=models,
        tasks=tuple(tasks),
        protocol=given.protocol,
        template=given.template,
        limit=given.limit,
        seeds=tuple(_seeds(given.seeds)),
        decoding=Decoding(given.num_beams, given.temperature, given.top_p, given.max_gen_toks, given.repeats),
        prompting=Prompting(given.template == "training", given.system_prompt, options),
        base_row=not given.no_base_row,
        base_tokenizer=_base_tokenizer(given.base_tokenizer, models),
        concurrency=given.concurrency,
        patience=Patience(seconds=given.request_timeout, retries=given.max_retries),
        files=files,
        split=given.split,
        seen_files=tuple(seen),
        url=given.base_url.rstrip("/").removesuffix("/v1") if given.base_url else None,
        server=ServerOptions(
            port=given.port,
            dtype=given.dtype,
            startup_seconds=given.startup_timeout,
            extra=tuple(shlex.split(given.server_args)),
            num_beams=given.num_beams,
            offline=files is not None and all(os.path.isdir(model.path) for model in models),
        ),
        out=given.out,
        log_samples=given.log_samples,
        strip_thinking=given.strip_thinking,
        gates=conditions,
    )


def _models(given: argparse.Namespace) -> tuple[tuple[Model, ...], list[str]]:
    base = os.path.expanduser(given.base)  # or a hub name
    models, problems = [Model(BASE, "base", base)], []
    for kind in ("adapter", "merged"):
        for text in getattr(given, kind):
            name, equals, path = text.partition("=")
            if not equals or not path or not re.fullmatch(r"\w[\w.-]*", name) or len(os.fsencode(name)) > LONGEST_NAME:
                problems.append(
                    f"--{kind} {text[:300]}: it must be NAME=DIR, NAME of letters, digits, '.', '_' and '-', no more "
                    f"than {LONGEST_NAME} bytes, a letter, digit or '_' first"
                )
            elif name == BASE or any(m.kind == kind and m.name == name for m in models):
                problems.append(f"--{kind} {text}: the name {name} is taken; use another one")
            else:
                models.append(Model(name, kind, os.path.expanduser(path)))
    local = models if given.base_url is None else models[:1]  # a running server names models, we read no folder
    problems += [problem for model in local if (problem := problem_with(model))]
    return tuple(models), problems


def _base_tokenizer(given: str | None, models: Sequence[Model]) -> str | None:
    """Return the path of the adapter or merged model named ``given``, or ``given`` itself where there is none."""
    return next((model.path for model in models if model.kind != "base" and model.name == given), given)


_RANGES = (("limit", 1, None), ("num_beams", 1, 64), ("concurrency", 1, 4096), ("port", 1, 65535),
           ("repeats", 1, 1024), ("max_gen_toks", 1, 10**6), ("num_fewshot", 0, 64),
           ("max_retries", 0, 100))  # fmt: skip


def _range_problems(given: argparse.Namespace) -> Iterator[str]:
    for key, low, high in _RANGES:
        value = getattr(given, key)
        if value is not None and (value < low or (high is not None and value > high)):
            allowed = f"between {low} and {high}" if high else f"at least {low}"
            yield f"--{key.replace('_', '-')}: {value} is invalid: must be {allowed}"
    for key in ("startup_timeout", "request_timeout"):
        value = getattr(given, key)
        if not 0 < value < math.inf:
            yield f"--{key.replace('_', '-')}: {value} is invalid: must be above 0"
    if not 0 <= given.temperature <= 2:
        yield f"--temperature: {given.temperature} is invalid: must be between 0 (greedy) and 2"
    if not 0 < given.top_p <= 1:
        yield f"--top-p: {given.top_p} is invalid: must be above 0 and at most 1"
    if not list(_seeds(given.seeds)):
        yield (
            f"--seeds: {given.seeds!r} is invalid: must be whole numbers from 0 to {_LARGEST_SEED}, comma "
            "separated; try 1,2,3"
        )
    if not given.tasks.strip(","):
        yield f"--tasks: none is named; try {DEFAULT_TASKS}"


def _setting_problems(given: argparse.Namespace) -> Iterator[str]:
    """Find settings that contradict others, or have no effect beside them."""
    if given.repeats > 1 and not given.temperature > 0:
        yield (
            f"--repeats: {given.repeats} greedy answers to a question are {given.repeats} times the same one; give "
            "--temperature too, 0.8 say"
        )
    if given.top_p != 1 and not given.temperature > 0:
        yield "--top-p: greedy decoding takes the likeliest token whatever it is; give --temperature too, 0.8 say"
    if given.num_beams > 1 and given.temperature > 0:
        yield "--num-beams: beam search does not sample; leave --num-beams or --temperature out"
    for key in ("system_prompt", "chat_template_kwargs"):
        if getattr(given, key) is not None and given.template != "training":
            yield f"--{key.replace('_', '-')}: raw text has no place for it; give --template training too"
    if given.no_base_row and not (given.adapter or given.merged):
        yield "--no-base-row: nothing is left to ask; give --adapter or --merged too"


def _idle_problems(given: argparse.Namespace) -> Iterator[str]:
    """Find settings of generated answers that are given although no task generates any.

    They would be recorded all the same, and make two equal runs look different.
    """
    none = Decoding()
    for key in (*vars(none), "strip_thinking"):
        if getattr(given, key) != getattr(none, key, False):
            yield f"--{key.replace('_', '-')}: no task of these generates text; leave it out, or add --tasks gsm8k"


def _template_options(text: str | None) -> tuple[dict[str, Any], list[str]]:
    if text is None:
        return {}, []
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        return {}, ["--chat-template-kwargs: it must be a JSON object; try '{\"enable_thinking\": false}'"]
    ours = [key for key in options if key in _TEMPLATE_OURS]
    return options, [f"--chat-template-kwargs: {key} is set by the harness; leave it out" for key in ours]


def _address_problems(given: argparse.Namespace) -> Iterator[str]:
    """Find what is wrong with ``--base-url``, its key, and the options given beside it.

    An address that may hold a key or a password is not repeated in a message.
    """
    if given.base_url is None:
        return
    parts = _split(given.base_url)
    if "@" in given.base_url:
        yield "--base-url: an address with a user or a password is not possible; put a key into OPENAI_API_KEY"
    elif "?" in given.base_url or "#" in given.base_url:
        yield "--base-url: an address with '?' or '#' is not possible; put a key into OPENAI_API_KEY"
    elif parts is None or parts[0] not in ("http", "https") or not parts[1]:
        yield f"--base-url: {given.base_url} is no URL; try http://127.0.0.1:8000"
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        yield "OPENAI_API_KEY: a key is one line of ASCII characters, this one holds others (a line end?); set it anew"
    if given.port or given.dtype or given.server_args:
        yield "--base-url: --port, --dtype and --server-args are for a server we start; leave them out"


def _split(url: str) -> tuple[str, str | None] | None:
    """Split an address into scheme and host; None when it is invalid."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises when it is no number
        (parts.hostname or "").encode("idna").decode("idna")  # raises when it can be no host's name
    except ValueError:
        return None
    return (parts.scheme, parts.hostname) if url.isprintable() and " " not in url else None


def _path_problems(given: argparse.Namespace) -> Iterator[str]:
    if (problem := output.problem_with(given.out)) is not None:
        yield problem
    if given.dataset_dir and not given.plan:
        yield "--dataset-dir: it only says where the data of --plan lies; give --plan too"
    yield from (f"--train-file: {path} does not exist" for path in given.train_file if not os.path.isfile(path))


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    good = all(word.isdecimal() and len(word) < 12 and int(word) <= _LARGEST_SEED for word in words)
    return list(dict.fromkeys(map(int, words))) if good else []


def _files(given: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, dict[str, Path]] | None:
    if given.data_dir is None:
        return None
    files = {task.name: local_files(task, given.data_dir, given.split) for task in tasks}
    for task in tasks:
        check_files(task, files[task.name])
    return files
