"""The command line of ``python -m eval.run``, checked as a whole before anything starts."""

import argparse
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from eval import gates
from eval.contamination import files_of_plan
from eval.data import check_files, local_files
from eval.errors import UsageError
from eval.models import BASE, Model, problem_with
from eval.protocols import PROTOCOLS, TEMPLATES, Task, load_tasks
from eval.server import ServerOptions


DEFAULT_SEED = 1234  # lm-evaluation-harness's own for drawing examples
DEFAULT_TASKS = "gsm8k,boolq,arc_easy,arc_challenge"
RESULTS_FILE = "eval_results.json"
# Words of vLLM's command line that the harness sets and relies on, and what to give in their place.
_OURS = {
    "--host": "it is 127.0.0.1 always",
    "--port": "use the harness's --port",
    "--dtype": "use the harness's --dtype",
    "--model": "use --base or --merged",
    "--served-model-name": "names come from --base, --adapter and --merged",
    "--lora-modules": "use --adapter",
    "--trust-remote-code": "code that comes with a model is never run",
}


@dataclass(frozen=True)
class Request:
    """One evaluation, valid as far as can be told without loading or starting anything.

    ``files`` holds the local files per task, None for the hub; ``url`` a server that runs already.
    """

    models: tuple[Model, ...]
    tasks: tuple[Task, ...]
    protocol: str
    template: str
    limit: int | None
    seeds: tuple[int, ...]
    num_beams: int
    concurrency: int
    files: dict[str, dict[str, Path]] | None
    split: str
    seen_files: tuple[Path, ...]
    url: str | None
    server: ServerOptions
    out: Path
    log_samples: bool
    strip_thinking: bool
    gates: gates.Gates


def build_parser() -> argparse.ArgumentParser:
    """Every option with its help."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Serve models with vLLM and score them.")
    add = parser.add_argument
    models = parser.add_argument_group("models")
    models.add_argument("--base", required=True, metavar="MODEL", help="folder or hub name; named 'base' in the table")
    for kind, what in (("adapter", "a LoRA adapter of the base"), ("merged", "a merged model; also the form in which "
                       "an adapter of the same NAME takes likelihood tasks on a CPU")):  # fmt: skip
        models.add_argument(f"--{kind}", action="append", default=[], metavar="NAME=DIR", help=what)
    add("--tasks", default=DEFAULT_TASKS, help=f"comma separated (default: {DEFAULT_TASKS}; also aqua, copa)")
    add("--protocol", choices=PROTOCOLS, required=True, help="how questions are put and answers read")
    add("--template", choices=TEMPLATES, default="none", help="training: the model's chat template; none: raw text")
    add("--limit", type=int, metavar="N", help="only the first N rows of each task")
    add("--seeds", default=str(DEFAULT_SEED), help=f"comma separated, for drawing examples (default: {DEFAULT_SEED})")
    add("--num-beams", type=int, default=1, metavar="N", help="beam search in place of greedy decoding")
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="DIR/TASK/SPLIT.jsonl in place of the hub")
    data.add_argument("--split", default="dev", help="file of --data-dir that is scored (default: dev)")
    data.add_argument("--train-file", type=Path, action="append", default=[], metavar="FILE",
                      help="refuse rows that stand in this training or calibration file")  # fmt: skip
    data.add_argument("--plan", type=Path, metavar="FILE", help="the same for the calibration data a rank plan names")
    data.add_argument("--dataset-dir", type=Path, metavar="DIR", help="folder of the dataset_info.json of --plan")
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="a server that runs already; it is left running")
    server.add_argument("--port", type=int, help="port of our server (default: a free one)")
    server.add_argument("--dtype", help="of our server (default: float32 on a CPU, else the model's own)")
    server.add_argument("--startup-timeout", type=float, default=900.0, metavar="SECONDS")
    server.add_argument("--server-args", default="", metavar="WORDS", help="further words for vLLM's command line")
    server.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests under way at a time")
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {RESULTS_FILE}, table, chart and logs")
    add("--strip-thinking", action="store_true", help="drop <think> blocks before an answer is read")
    gates.add_arguments(parser)
    add("--log-samples", action="store_true", help="also write samples.jsonl: every prompt, answer and metric")
    return parser


def parse(argv: Sequence[str] | None = None) -> Request:
    """Parse and check.

    Raises:
        UsageError: all problems at once.
    """
    given = build_parser().parse_args(argv)
    problems: list[str] = [*_range_problems(given), *_path_problems(given)]
    models, found = _models(given)
    problems += found
    tasks: list[Task] = []
    files: dict[str, dict[str, Path]] | None = None
    seen: list[Path] = list(given.train_file)
    try:
        tasks = load_tasks(given.protocol, [name for name in given.tasks.split(",") if name])
        files = _files(given, tasks)
        seen += files_of_plan(given.plan, given.dataset_dir) if given.plan else []
    except UsageError as error:
        problems += error.problems
    conditions, found = gates.parse(given, [model.name for model in models], [task.name for task in tasks])
    problems += found if tasks else []
    if given.strip_thinking and tasks and all(task.likelihood for task in tasks):
        problems.append("--strip-thinking: no task of these generates text; leave it out")
    if problems := problems or list(_folder_problems(given.out)):
        raise UsageError(problems)
    return Request(
        models=models,
        tasks=tuple(tasks),
        protocol=given.protocol,
        template=given.template,
        limit=given.limit,
        seeds=tuple(_seeds(given.seeds)),
        num_beams=given.num_beams,
        concurrency=given.concurrency,
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
            offline=files is not None and all(Path(model.path).is_dir() for model in models),
        ),
        out=given.out,
        log_samples=given.log_samples,
        strip_thinking=given.strip_thinking,
        gates=conditions,
    )


def _models(given: argparse.Namespace) -> tuple[tuple[Model, ...], list[str]]:
    base = str(Path(given.base).expanduser()) if given.base.startswith("~") else given.base  # or a hub name
    models, problems = [Model(BASE, "base", base)], []
    for kind in ("adapter", "merged"):
        for text in getattr(given, kind):
            name, equals, path = text.partition("=")
            if not equals or not path or not re.fullmatch(r"[\w.-]+", name):
                problems.append(f"--{kind} {text}: it must be NAME=DIR, NAME of letters, digits, '.', '_' and '-'")
            elif name == BASE or any(m.kind == kind and m.name == name for m in models):
                problems.append(f"--{kind} {text}: the name {name} is taken; use another one")
            else:
                models.append(Model(name, kind, str(Path(path).expanduser())))
    local = models if given.base_url is None else models[:1]  # a running server names models, we read no folder
    problems += [problem for model in local if (problem := problem_with(model))]
    return tuple(models), problems


def _range_problems(given: argparse.Namespace) -> Iterator[str]:
    for key, high in (("limit", None), ("num_beams", 64), ("concurrency", 4096), ("port", 65535)):
        value = getattr(given, key)
        if value is not None and (value < 1 or (high is not None and value > high)):
            allowed = f"between 1 and {high}" if high else "at least 1"
            yield f"--{key.replace('_', '-')}: {value} is not possible: it must be {allowed}"
    if not given.startup_timeout > 0:
        yield f"--startup-timeout: {given.startup_timeout} is not possible: it must be above 0"
    if not list(_seeds(given.seeds)):
        yield f"--seeds: {given.seeds!r} is not possible: it must be whole numbers from 0, comma separated; try 1,2,3"
    if not given.tasks.strip(","):
        yield f"--tasks: none is named; try {DEFAULT_TASKS}"
    if given.base_url is not None and "@" in given.base_url:
        yield "--base-url: an address with a user or a password is not possible; put a key into OPENAI_API_KEY"
    elif given.base_url is not None and (urlsplit(given.base_url).scheme not in ("http", "https")):
        yield f"--base-url: {given.base_url} is no URL; try http://127.0.0.1:8000"
    if given.base_url is not None and (given.port or given.dtype or given.server_args):
        yield "--base-url: --port, --dtype and --server-args are for a server we start; leave them out"
    yield from _server_word_problems(given.server_args)


def _server_word_problems(text: str) -> Iterator[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        yield f"--server-args: this is no command line ({error})"  # which may hold a key
        return
    for word in words:
        option = word.partition("=")[0].replace("_", "-")  # vLLM takes both, and any beginning that is unique
        for ours in (ours for ours in _OURS if len(option) > 2 and ours.startswith(option)):
            yield f"--server-args: {word} would undo what the harness sets ({ours}); {_OURS[ours]}"


def _path_problems(given: argparse.Namespace) -> Iterator[str]:
    if (given.out / RESULTS_FILE).exists():
        yield f"--out: {given.out} holds results already, nothing was overwritten; try another folder"
    elif given.out.exists() and not given.out.is_dir():
        yield f"--out: {given.out} is a file; give a folder"
    if given.dataset_dir and not given.plan:
        yield "--dataset-dir: it only says where the data of --plan lies; give --plan too"
    yield from (f"--train-file: {path} does not exist" for path in given.train_file if not path.is_file())


def _folder_problems(out: Path) -> Iterator[str]:
    """Make the folder for the results: hours later is too late to learn that it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield f"--out: {out} cannot be made ({error.strerror}); give another folder"
        return
    if not os.access(out, os.W_OK | os.X_OK):
        yield f"--out: {out} cannot be written; give another folder"


def _seeds(text: str) -> list[int]:
    words = text.split(",")
    return list(dict.fromkeys(map(int, words))) if all(word.isdecimal() for word in words) else []


def _files(given: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, dict[str, Path]] | None:
    if given.data_dir is None:
        return None
    files = {task.name: local_files(task, given.data_dir, given.split) for task in tasks}
    for task in tasks:
        check_files(task, files[task.name])
    return files
