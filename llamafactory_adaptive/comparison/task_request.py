"""Arguments of ``compare`` about tasks, checked before anything starts.

The command line imports this for its help: whatever imports NumPy is imported where it is needed.
"""

import argparse
import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from llamafactory_adaptive.errors import Problem, refuse, refuse_all
from llamafactory_adaptive.paths import path_argument


PYTHON_VARIABLE = "LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON"
# Options of the harness that the command sets itself, or that concern other models than the arms' adapters.
_OURS = {
    "--tasks": "--tasks", "--protocol": "--eval-protocol", "--limit": "--eval-limit",
    "--data-dir": "--eval-data", "--base": "model_name_or_path",
}  # fmt: skip
_SET = ("--adapter", "--merged", "--no-base-row", "--base-tokenizer", "--out", "--log-samples", "--base-url", "--port",
        "--fail-under", "--fail-if-worse-than")  # fmt: skip
# Arguments that mean nothing without --tasks.
_OF_TASKS = ("task_effect", "eval_python", "eval_data", "eval_protocol", "eval_limit", "eval_args")


@dataclass(frozen=True)
class TaskRequest:
    """What the arms' adapters are to be asked, checked as far as that is possible without the harness.

    Attributes:
        tasks: names of tasks of the harness.
        effect: smallest difference in accuracy that matters, as a share of 1.
        protocol: how questions are put and answers read.
        data: absolute path of the folder of the rows; None for the hub.
        python: interpreter of the harness's environment.
        words: options of the harness, without its models and its output folder.
    """

    tasks: tuple[str, ...]
    effect: float
    protocol: str
    data: str | None
    python: Path
    words: tuple[str, ...]


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments about tasks to those of the command."""
    group = parser.add_argument_group("tasks, which the adapters of the runs that judge answer in vLLM")
    add = group.add_argument
    add("--tasks", metavar="NAMES", help="tasks of the evaluation harness, e.g. gsm8k,boolq,arc_easy (default: none)")
    add("--task-effect", metavar="POINTS",
        help="smallest difference in accuracy that matters, in percentage points, e.g. 2 (default: 1)")  # fmt: skip
    add("--eval-python", type=path_argument, metavar="PATH",
        help="Python of an environment with vLLM and lm-evaluation-harness, e.g. .venv-eval/bin/python "
        f"(default: what {PYTHON_VARIABLE} names)")  # fmt: skip
    add("--eval-data", type=path_argument, metavar="DIR",
        help="folder with TASK/dev.jsonl for each task, e.g. data (default: the hub)")  # fmt: skip
    add("--eval-protocol", metavar="NAME",
        help="how questions are put and answers read, e.g. llm_adapters (default: lm_eval)")  # fmt: skip
    add("--eval-limit", type=int, metavar="N", help="the first N questions of each task, e.g. 200 (default: all)")
    add("--eval-args", metavar="WORDS",
        help='further options of python -m eval.run, e.g. --eval-args="--template training"')  # fmt: skip


def task_request_of(arguments: argparse.Namespace) -> TaskRequest | None:
    """Build what the arguments ask for; None without ``--tasks``.

    Raises:
        AdaptiveConfigError: an argument is wrong, or has no effect.
    """
    if arguments.tasks is None:
        if idle := [key for key in _OF_TASKS if getattr(arguments, key) is not None]:
            refuse(_option(idle[0]), str(getattr(arguments, idle[0])), "it has no effect without --tasks",
                   "--tasks gsm8k beside it, or leaving it out")  # fmt: skip
        return None
    tasks = tuple(name.strip() for name in arguments.tasks.split(",") if name.strip())
    refuse_all(*_problems(arguments, tasks))
    protocol, data = arguments.eval_protocol or "lm_eval", arguments.eval_data
    rows = None if data is None else os.path.abspath(data.expanduser())
    words = ["--tasks", ",".join(tasks), "--protocol", protocol]
    words += [] if arguments.eval_limit is None else ["--limit", str(arguments.eval_limit)]
    words += [] if rows is None else ["--data-dir", rows]
    words += _split(arguments.eval_args)
    return TaskRequest(tasks, points_of(arguments.task_effect), protocol, rows, _python_of(arguments), tuple(words))


def _problems(arguments: argparse.Namespace, tasks: tuple[str, ...]) -> list[Problem]:
    problems = []
    if not tasks:
        problems.append(Problem("--tasks", arguments.tasks, "must name a task", "--tasks gsm8k,boolq"))
    if (folder := arguments.eval_data) is not None and not os.path.isdir(folder.expanduser()):
        problems.append(
            Problem("--eval-data", str(folder), "there is no such folder", "a folder that holds TASK/dev.jsonl")
        )
    for word in _split(arguments.eval_args):
        name = word.partition("=")[0]
        if name in _OURS or name in _SET:
            instead = f"{_OURS[name]} in its place" if name in _OURS else "leaving it out"
            problems.append(Problem("--eval-args", arguments.eval_args, f"{name} is set by this command", instead))
    return problems


def _split(text: str | None) -> list[str]:
    try:
        return shlex.split(text or "")
    except ValueError as error:
        refuse("--eval-args", text, f"it cannot be split into words ({error})", "closing every quotation mark",
               cause=error)  # fmt: skip


def _python_of(arguments: argparse.Namespace) -> Path:
    """Return the absolute path of the interpreter; links stay, as an environment is found by them."""
    given = arguments.eval_python
    named = os.environ.get(PYTHON_VARIABLE) if given is None else str(given)
    instead = "--eval-python .venv-eval/bin/python, which `make eval-install` makes"
    if not named:
        refuse("--eval-python", None, "tasks are answered in an environment of their own, with vLLM", instead)
    python = Path(os.path.abspath(os.path.expanduser(named)))
    if not (python.is_file() and os.access(python, os.X_OK)):
        key = PYTHON_VARIABLE if given is None else "--eval-python"
        refuse(key, named, "there is no program of that name", instead)
    return python


def points_of(text: str | None) -> float:
    """Convert percentage points, ``1`` or ``1%``, to a share of 1; None is one point.

    Raises:
        AdaptiveConfigError: it is no number above 0 and up to 50.
    """
    try:
        points = float((text or "1").removesuffix("%"))
    except ValueError:
        points = math.nan
    if not 0.0 < points <= 50.0:
        refuse("--task-effect", text, "must be percentage points above 0, and 50 at most", "--task-effect 1")
    return points / 100.0


def points(share: float) -> str:
    """Write a share of 1 as percentage points: ``1 point``, ``0.5 points``."""
    return f"{100 * share:g} point{'' if abs(100 * share - 1.0) < 1e-9 else 's'}"


def in_our_words(said: str) -> str:
    """Replace names of the harness's options by those of this command's that set them."""
    for theirs, ours in _OURS.items():
        said = said.replace(f"{theirs}:", f"{ours}:").replace(f"{theirs} ", f"{ours} ")
    return said


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"
