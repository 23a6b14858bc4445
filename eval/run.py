"""Evaluates a base model, adapters and merged models: ``python -m eval.run --help``, and ``eval/README.md``.

Exit codes: 0 done, 2 user error (one message on stderr, no traceback), 3 a condition of ``--fail-under`` or
``--fail-if-worse-than`` not met, 130 interrupted, 1 a bug. Whatever happens, no server that was started here is left
behind.
"""

import os
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from eval import gates, report, results, samples_page
from eval.arguments import RESULTS_FILE, Request, parse
from eval.contamination import read_seen, refuse_seen
from eval.errors import EvalError
from eval.models import Job, Serving, plan_servings
from eval.protocols import Task
from eval.redaction import redacted
from eval.server import check_port, on_cpu, vllm_command
from eval.serving import Command, Endpoint, endpoint


if TYPE_CHECKING:
    from eval.client import LastWords

PACKAGES = ("lm_eval", "torch", "transformers", "datasets")


@dataclass
class Record:
    """What a run has gathered so far."""

    answers: list[results.Answers] = field(default_factory=list)
    samples: dict[str, list[Any]] = field(default_factory=dict)
    timings: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None, command: Command = vllm_command) -> int:
    """Run one evaluation; returns the exit code. ``command`` makes a server's command line."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))  # one way out for both
    try:
        request = parse(argv)
        failed = _write(request, evaluate(request, command), redacted(sys.argv[1:] if argv is None else argv))
    except EvalError as error:
        print(f"eval: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\neval: interrupted; no server was left running, no results were written", file=sys.stderr)
        return 130
    for sentence in failed:
        print(f"eval: failed: {sentence}", file=sys.stderr)
    return gates.FAILED if failed else 0


def evaluate(request: Request, command: Command = vllm_command) -> Record:
    """Check everything that can be checked, then serve and ask, one server at a time.

    Raises:
        EvalError: nothing that was started is running any more.
    """
    if request.server.port is not None:
        check_port(request.server.port)
    servings = plan_servings(request.models, request.tasks, on_cpu() and request.url is None)
    if request.server.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # all is local; the libraries read this when they are imported
    loaded, last_words = _load(request, servings)
    record = Record(versions=_versions(), data=_data(request, loaded), warnings=last_words.warnings)
    for number, serving in enumerate(servings, 1):
        title = f"[{number}/{len(servings)}] {', '.join(job.model for job in serving.jobs)}:"
        with endpoint(request, serving, command, partial(print, title, flush=True)) as place:
            record.versions["vllm"] = place.version
            for job in serving.jobs:
                _ask(request, job, place, loaded, record, last_words)
    return record


def _load(request: Request, servings: Sequence[Serving]) -> tuple[dict[str, Any], "LastWords"]:
    """Tasks with their rows by name, checked against what the models have seen; tokenizers checked too."""
    print("loading tasks", flush=True)
    from eval import client  # takes seconds, so not before the checks above

    last_words = client.quiet()
    loaded = client.load(request.tasks, request.template, request.files, request.strip_thinking)
    _guard(request, [client.questions(t, made, request.limit) for t, made in zip(request.tasks, loaded, strict=True)])
    client.check_tokenizers({job.tokenizer for s in servings for job in s.jobs}, request.template)
    return {task.name: made for task, made in zip(request.tasks, loaded, strict=True)}, last_words


def _guard(request: Request, questions: Sequence[Sequence[str]]) -> None:
    if not request.seen_files:
        return
    seen = read_seen(request.seen_files)
    for task, asked in zip(request.tasks, questions, strict=True):
        refuse_seen(task.name, asked, seen)
    print(f"none of {sum(map(len, questions))} rows stands in {', '.join(map(str, request.seen_files))}", flush=True)


def _ask(
    request: Request, job: Job, place: Endpoint, loaded: Mapping[str, Any], record: Record, last_words: "LastWords"
) -> None:
    from eval import client

    print(f"  {job.model} ({job.form}): {', '.join(task.name for task in job.tasks)}", flush=True)
    model = {
        "url": place.url,
        "name": place.names[job.served_as],
        "tokenizer": job.tokenizer,
        "max_length": place.max_length,
        "num_beams": request.num_beams,
        "concurrency": request.concurrency,
    }
    made, chat = [loaded[task.name] for task in job.tasks], request.template == "training"
    try:
        asked = client.ask_model(model, job.tasks, made, request.seeds, request.limit, chat)
    except client.CONNECTION_ERRORS as error:
        print(file=sys.stderr)  # ends the line of the progress bar
        raise EvalError(_why(error, place, job, last_words.last)) from error
    record.answers += results.gather(job.model, job.form, job.tasks, asked.samples, asked.cut)
    record.samples.setdefault(job.model, []).extend(asked.samples)
    record.timings.append(
        {"model": job.model, "form": job.form, "requests": asked.requests, "seconds": round(asked.seconds, 2)}
    )


def _why(error: Exception, place: Endpoint, job: Job, last_words: str) -> str:
    """One line for a connection that broke."""
    ended = place.server.died(patience=10) if place.server else None
    if ended is not None:
        return f"the server ended while {job.model} was asked: {ended}"
    words = f"; it said: {last_words[:300]}" if last_words else ""
    log = f"; log: {place.server.log}" if place.server else ""
    return f"{place.url} failed while {job.model} was asked: {type(error).__name__}: {error}{words}{log}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write(request: Request, record: Record, words: str) -> list[str]:
    """Print the table and write every file; the results last, so that a folder that has them is whole.

    Returns:
        What conditions are not met.
    """
    models, tasks = [model.name for model in request.models], [task.name for task in request.tasks]
    answers = sorted(record.answers, key=lambda a: (models.index(a.model), tasks.index(a.task.name)))
    scores, means, compared = results.scores(answers), results.means(answers), results.comparisons(answers)
    text = report.table(scores, means, record.versions)
    if compared:
        text += "\n\n" + report.comparison_text(compared)
    print("\n" + text)
    report.save_chart(scores, request.out / report.CHART_FILE)
    results.write_atomically(request.out / report.TABLE_FILE, text + "\n")
    if request.log_samples:
        results.write_samples(request.out / results.SAMPLES_FILE, record.samples)
    figures = {"scores": [asdict(score) for score in scores], "means": means, "comparisons": compared}
    results.write_json(
        request.out / RESULTS_FILE, {**_how(request, record), **figures, **_circumstances(request, record, words)}
    )
    if request.log_samples:
        samples_page.write_page(request.out)
    print(f"\nwritten to {request.out}: {RESULTS_FILE}, {report.TABLE_FILE}, {report.CHART_FILE}")
    return gates.failures(request.gates, figures["scores"], means, compared)


def _how(request: Request, record: Record) -> dict[str, Any]:
    """What was asked of whom, and how."""
    return {
        "schema_version": results.SCHEMA_VERSION,
        "protocol": request.protocol,
        "template": request.template,
        "decoding": {"num_beams": request.num_beams, "temperature": 0.0, "strip_thinking": request.strip_thinking},
        "seeds": list(request.seeds),
        "limit": request.limit,
        "data": record.data,
        "models": [asdict(model) for model in request.models],
    }


def _circumstances(request: Request, record: Record, words: str) -> dict[str, Any]:
    """When, with what, how fast."""
    return {
        "timings": record.timings,
        "warnings": record.warnings,
        "contamination_checked_against": [str(path) for path in request.seen_files],
        "command": f"python -m eval.run {words}",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": record.versions,
    }


def _data(request: Request, loaded: Mapping[str, Any]) -> dict[str, Any]:
    """Where the rows came from, and which ones they are whatever the source calls them."""
    from eval import client

    scored = {name: client.scored_digest(made, request.limit) for name, made in loaded.items()}
    if request.files is None:
        sets = {t.name: _hub_set(t) | {"scored_sha256": scored[t.name]} for t in request.tasks}
        return {"source": "hub", "sets": sets}
    files = {name: {s: results.digest(path) for s, path in found.items()} for name, found in request.files.items()}
    sets = {name: {"split": request.split, "sha256": files[name], "scored_sha256": scored[name]} for name in files}
    return {"source": "local", "sets": sets}


def _hub_set(task: Task) -> dict[str, Any]:
    config = task.config
    return {"path": config["dataset_path"], "config": config["dataset_name"], "split": config["test_split"]}


if __name__ == "__main__":
    sys.exit(main())
