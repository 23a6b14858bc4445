"""Results of a run: scores and paired comparisons, computed from samples, and the files that hold them.

The schema of ``eval_results.json`` is described in ``eval/README.md``; ``SCHEMA_VERSION`` changes with it.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from eval import extraction, stats
from eval.own_files import open_own
from eval.protocols import Task
from eval.redaction import clean


SCHEMA_VERSION = 3
RESULTS_FILE = "eval_results.json"
SAMPLES_FILE = "samples.jsonl"
NO_ANSWER = ("", extraction.NOT_FOUND, "inf")  # what the extractions return where there is no answer


@dataclass(frozen=True)
class Score:
    """One figure of the table.

    Attributes:
        value, stderr: the figure and its standard error, as shares of 1.
        n: number of rows.
        n_cut: number of rows whose prompts were longer than the server takes and lost their beginning.
        repeats: number of answers to each row.
    """

    model: str
    form: str
    protocol: str
    task: str
    task_version: str
    metric: str
    headline: bool
    value: float
    stderr: float
    n: int
    n_cut: int
    fewshot: int
    repeats: int = 1


@dataclass(frozen=True)
class Answers:
    """Values of one model in one form on one task: per metric and seed, one value per row.

    Where rows were asked several times, a value is the mean over the ``repeats``; see :func:`gather`.
    """

    model: str
    form: str
    task: Task
    values: Mapping[str, Mapping[int, Sequence[float]]]
    n_cut: int = 0
    repeats: int = 1

    def per_row(self, metric: str) -> list[float]:
        """Average a metric over the seeds, one value per row."""
        return [stats.mean(values) for values in zip(*self.values[metric].values(), strict=True)]


def gather(
    model: str, form: str, tasks: Sequence[Task], samples: Sequence[Any], cut: Mapping[str, set[int]] | None = None
) -> list[Answers]:
    """Gather samples (``client.Sample``) by task, metric and seed, in the order of their rows.

    The row is the sampling unit. Rows that were asked several times (``sample.repeat``) have the mean over the repeats
    as their value; the headline metric also has ``pass@k`` (one of k answers is right, estimated without bias) for
    k = 2, 4, 8 ... and all, and ``maj@n`` (the answer that most repeats agree on).

    Args:
        model: name of the model.
        form: form in which the model was served.
        tasks: the tasks that were asked.
        samples: samples of all tasks.
        cut: per task, the rows whose prompts did not fit.
    """
    asked: dict[str, dict[int, dict[int, list[Any]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for sample in sorted(samples, key=lambda sample: (sample.row, sample.repeat)):
        asked[sample.task][sample.seed][sample.row].append(sample)
    return [_answers(model, form, task, asked[task.name], len((cut or {}).get(task.name, ()))) for task in tasks]


def _answers(
    model: str, form: str, task: Task, asked: Mapping[int, Mapping[int, Sequence[Any]]], n_cut: int
) -> Answers:
    values: dict[str, dict[int, list[float]]] = defaultdict(dict)
    repeats = min((len(row) for rows in asked.values() for row in rows.values()), default=1)
    for seed, rows in asked.items():
        for row in rows.values():
            for metric, value in _of_row(task, row[:repeats]).items():
                values[metric].setdefault(seed, []).append(value)
    return Answers(model, form, task, values, n_cut, repeats)


def _of_row(task: Task, row: Sequence[Any]) -> dict[str, float]:
    """Compute every metric of one row over its repeats."""
    metrics = {metric: stats.mean([sample.metrics[metric] for sample in row]) for metric in row[0].metrics}
    values = [sample.metrics.get(task.headline) for sample in row]
    if len(row) == 1 or not set(values) <= {0.0, 1.0}:
        return metrics
    for k in sorted({2**i for i in range(1, len(row).bit_length())} | {len(row)}):
        metrics[f"pass@{k}"] = stats.pass_at_k(sum(value == 1 for value in values), len(row), k)
    answers = [answer for sample in row if (answer := _voted(task, sample.extracted)) is not None]
    if len(answers) == len(row):
        metrics[f"maj@{len(row)}"] = values[stats.majority(answers, NO_ANSWER)]
    return metrics


def _voted(task: Task, extracted: Mapping[str, str]) -> str | None:
    """Return the answer that a sample votes for, normalised for comparison; None where there is none.

    It is what the headline's filter left, or what the task reads in the response.
    """
    answer = extracted.get(task.headline.partition(",")[2] or task.headline)
    if answer is None and task.reads is not None and "none" in extracted:
        answer = task.reads(extracted["none"]).get(task.headline)
    return None if answer is None else extraction.compared(answer)


def scores(answers: Sequence[Answers]) -> list[Score]:
    """Compute every metric of every task of every model."""
    return [
        Score(
            model=a.model,
            form=a.form,
            protocol=a.task.protocol,
            task=a.task.name,
            task_version=a.task.version,
            metric=metric,
            headline=metric == a.task.headline,
            value=stats.mean(rows := a.per_row(metric)),
            stderr=stats.standard_error(rows),
            n=len(rows),
            n_cut=a.n_cut,
            fewshot=a.task.fewshot,
            repeats=a.repeats,
        )
        for a in answers
        for metric in a.values
    ]


def _headlines(answers: Sequence[Answers]) -> dict[str, dict[str, Answers]]:
    """Index answers by model and task, in the order of appearance."""
    by_model: dict[str, dict[str, Answers]] = {}
    for a in answers:
        by_model.setdefault(a.model, {})[a.task.name] = a
    return by_model


def means(answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """Average the tasks' headline metrics for each model, unweighted, with the standard error."""
    rows = []
    for model, tasks in _headlines(answers).items():
        value, error = stats.mean_over_tasks([a.per_row(a.task.headline) for a in tasks.values()])
        rows.append({"model": model, "value": value, "stderr": error, "tasks": list(tasks)})
    return rows


def comparisons(answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """Compare every pair of models on the headline metrics.

    McNemar's test is made per task and seed, the sign-flip test for the mean over tasks. ``p_holm`` corrects for the
    lines of one pair, all its tasks and seeds; not for the number of pairs.
    """
    return [compare(*pair) for pair in combinations(_headlines(answers).items(), 2)]


def compare(one: tuple[str, Mapping[str, Answers]], other: tuple[str, Mapping[str, Answers]]) -> dict[str, Any]:
    """Compare two models, each with its answers per task, on the same rows."""
    (first, ours), (second, theirs) = one, other
    rows = {t: a.per_row(a.task.headline) for t, a in ours.items()}
    others = {t: theirs[t].per_row(a.task.headline) for t, a in ours.items()}
    lines = [entry for t in ours for entry in _mcnemar(ours[t], theirs[t])]
    adjusted = stats.holm([line["p_value"] for line in lines])
    return {
        "first": first,
        "second": second,
        "mean_difference": asdict(stats.paired_difference(rows, others)),
        "tasks": [line | {"p_holm": p} for line, p in zip(lines, adjusted, strict=True)],
    }


def _mcnemar(first: Answers, second: Answers) -> list[dict[str, Any]]:
    metric = first.task.headline
    one, two = first.values[metric], second.values[metric]
    return [
        {
            "task": first.task.name,
            "metric": metric,
            "seed": seed,
            "difference": stats.mean(two[seed]) - stats.mean(one[seed]),
        }
        | asdict(stats.mcnemar(one[seed], two[seed]))
        for seed in one
    ]


def digest(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically (whole or not at all), cleaned of secrets.

    Half of a surrogate pair, which UTF-8 cannot hold, is written as its escape, from which JSON restores it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open_own(
        scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "w", encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.write(clean(text))
    scratch.replace(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document atomically; NaN (the standard error of a single row) becomes null."""
    write_atomically(path, json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value
