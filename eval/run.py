"""The command ``python -m eval.run``, which evaluates a base model, adapters and merged models (``eval/README.md``).

Exit codes: 0 done, 2 user error (one message on stderr, no traceback), 3 a condition of ``--fail-under`` or
``--fail-if-worse-than`` not met, 130 interrupted, 1 a bug. However a run ends, no server that it started is left
behind and every answer is kept; the same command resumes it.
"""

import os
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from eval import gates, report, results, samples_page
from eval.arguments import Request, parse
from eval.asking import Record, Round, settings_of
from eval.cache import ANSWERS_FILE, AnswerCache
from eval.contamination import read_seen, refuse_seen
from eval.errors import EvalError
from eval.models import Serving, base_warnings, plan_servings
from eval.output import OutputFolder
from eval.protocols import Task
from eval.redaction import guarded, redacted, without_control
from eval.server import check_port, on_cpu, vllm_command
from eval.serving import Command


if TYPE_CHECKING:
    from eval.client import Warnings

PACKAGES = ("lm_eval", "torch", "transformers", "datasets")


def main(argv: Sequence[str] | None = None, command: Command = vllm_command) -> int:
    """Run one evaluation from the command line, and return the exit code.

    Args:
        argv: the arguments; None for those of this process.
        command: returns a server's command line.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    words = sys.argv[1:] if argv is None else argv
    with guarded(words):
        try:
            failed = run(parse(argv), command, redacted(words))
        except EvalError as error:
            print(f"eval: error: {without_control(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("\neval: interrupted; no server was left running. Answers are kept: the same command goes on",
                  file=sys.stderr)  # fmt: skip
            return 130
        for sentence in failed:
            print(f"eval: failed: {without_control(sentence)}", file=sys.stderr)
    return gates.FAILED if failed else 0


def _interrupt(*_: object) -> None:
    """Send this process SIGINT as Ctrl-C does, also where SIGINT is ignored, as in a script's background job."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)


def run(request: Request, command: Command, words: str) -> list[str]:
    """Ask, score and write one evaluation; return the conditions that are not met.

    Raises:
        EvalError: the run failed; every server that it started has ended, and the answers so far are kept.
    """
    versions = installed_versions()
    with OutputFolder(request.out) as folder:
        goes_on = folder.claim(settings_of(request, versions))
        with AnswerCache(request.out / ANSWERS_FILE) as cache:
            if goes_on:
                dropped = f", {cache.damaged} damaged lines are asked again" if cache.damaged else ""
                print(f"going on with the run in {request.out}: {len(cache)} answers are kept{dropped}", flush=True)
            record = evaluate(request, folder, cache, command, versions)
            return _write(request, folder, record, words)


def evaluate(
    request: Request, folder: OutputFolder, cache: AnswerCache, command: Command, versions: Mapping[str, str]
) -> Record:
    """Check everything that can be checked, then serve and ask the models, one server at a time.

    Raises:
        EvalError: the run failed; every server that it started has ended.
    """
    servings, loaded, said = prepare(request)
    record = Record(versions=dict(versions), data=_data(request, loaded), warnings=said.texts)
    for warning in base_warnings(request.models) if request.url is None else ():
        print(f"warning: {warning}", flush=True)
        record.warnings.append(warning)
    asking = Round(request, loaded, cache, folder, record, command)
    for number, serving in enumerate(servings, 1):
        asking.ask(serving, f"[{number}/{len(servings)}] {', '.join(job.model for job in serving.jobs)}:")
    return record


def prepare(request: Request) -> "tuple[Sequence[Serving], dict[str, Any], Warnings]":
    """Check the port, divide models among servers and load the tasks by name, before any server starts.

    Raises:
        EvalError: the port is taken, rows or tokenizers cannot be loaded, or a model cannot be served for a task.
    """
    if request.server.port is not None:
        check_port(request.server.port)
    servings = plan_servings(
        request.models, request.tasks, on_cpu() and request.url is None, request.base_tokenizer, request.base_row
    )
    go_offline(request)
    loaded, said = _load(request, servings)
    return servings, loaded, said


def go_offline(request: Request) -> None:
    """Keep the libraries off the hub where models and rows are all local; they read this when they are imported."""
    if request.server.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _load(request: Request, servings: Sequence[Serving]) -> tuple[dict[str, Any], "Warnings"]:
    """Load tasks with their rows by name, and check the rows against training data, and that tokenizers load."""
    print("loading tasks", flush=True)
    from eval import client, hub  # takes seconds, so not before the checks above

    said = client.quiet()
    loaded = client.load(request.tasks, request.template, request.files, request.strip_thinking)
    _guard(request, [client.questions(t, made, request.limit) for t, made in zip(request.tasks, loaded, strict=True)])
    hub.check_tokenizers({job.tokenizer for s in servings for job in s.jobs}, request.template)
    return {task.name: made for task, made in zip(request.tasks, loaded, strict=True)}, said


def _guard(request: Request, questions: Sequence[Sequence[str]]) -> None:
    if not request.seen_files:
        return
    seen = read_seen(request.seen_files)
    for task, asked in zip(request.tasks, questions, strict=True):
        refuse_seen(task.name, asked, seen)
    print(f"none of {sum(map(len, questions))} rows stands in {', '.join(map(str, request.seen_files))}", flush=True)


def installed_versions() -> dict[str, str]:
    """Look up the versions of Python and of the packages that figures may depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _write(request: Request, folder: OutputFolder, record: Record, words: str) -> list[str]:
    """Print the table and write every file: results first, pictures and pages last.

    Returns:
        One sentence for each condition that is not met.
    """
    models, tasks = [model.name for model in request.models], [task.name for task in request.tasks]
    answers = sorted(record.answers, key=lambda a: (models.index(a.model), tasks.index(a.task.name)))
    scores, means, compared = results.scores(answers), results.means(answers), results.comparisons(answers)
    figures = {"scores": [asdict(score) for score in scores], "means": means, "comparisons": compared}
    folder.write_json(
        results.RESULTS_FILE, {**_how(request, record), **figures, **_circumstances(request, record, words)}
    )
    text = report.table(scores, means, record.versions)
    if compared:
        text += "\n\n" + report.comparison_text(compared)
    text += "".join(f"\nWARNING: {warning}" for warning in record.all_warnings)
    print("\n" + text)
    folder.write_text(report.TABLE_FILE, text + "\n")
    folder.write_picture(report.CHART_FILE, lambda path: report.save_chart(scores, path))
    if request.log_samples:
        folder.write_text(samples_page.PAGE_FILE, samples_page.page_of_folder(request.out))
    folder.finish()
    print(f"\nwritten to {request.out}: {results.RESULTS_FILE}, {report.TABLE_FILE}, {report.CHART_FILE}")
    return gates.failures(request.gates, figures["scores"], means, compared)


def _how(request: Request, record: Record) -> dict[str, Any]:
    """Describe which models were asked which rows, and with which settings."""
    return {
        "schema_version": results.SCHEMA_VERSION,
        "protocol": request.protocol,
        "template": request.template,
        "decoding": {**asdict(request.decoding), "strip_thinking": request.strip_thinking},
        "prompting": asdict(request.prompting),
        "base_tokenizer": request.base_tokenizer,
        "seeds": list(request.seeds),
        "limit": request.limit,
        "data": record.data,
        "models": [asdict(model) for model in request.models],
    }


def _circumstances(request: Request, record: Record, words: str) -> dict[str, Any]:
    """Describe the circumstances of a run: timings, warnings, command, date and versions."""
    return {
        "timings": record.timings,
        "warnings": record.all_warnings,
        "contamination_checked_against": [str(path) for path in request.seen_files],
        "command": f"python -m eval.run {words}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": record.versions,
    }


def _data(request: Request, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the source of the rows, with digests of those that are scored."""
    from eval import client

    scored = {name: client.scored_digest(made, request.limit) for name, made in loaded.items()}
    if request.files is None:
        sets = {t.name: _hub_set(t) | {"scored_sha256": scored[t.name]} for t in request.tasks}
        return {"source": "hub", "sets": sets}
    files = {name: {s: results.digest(path) for s, path in paths.items()} for name, paths in request.files.items()}
    sets = {name: {"split": request.split, "sha256": files[name], "scored_sha256": scored[name]} for name in files}
    return {"source": "local", "sets": sets}


def _hub_set(task: Task) -> dict[str, Any]:
    config = task.config
    return {"path": config["dataset_path"], "config": config["dataset_name"], "split": config["test_split"]}


if __name__ == "__main__":
    sys.exit(main())
