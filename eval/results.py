"""From samples to figures and files: scores, paired comparisons, ``eval_results.json``, ``samples.jsonl``.

The schema of ``eval_results.json`` is told in ``eval/README.md``; ``SCHEMA_VERSION`` changes with it.
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

from eval import stats
from eval.protocols import Task


SCHEMA_VERSION = 2
SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True)
class Score:
    """One figure of the table. ``value`` and ``stderr`` are shares of 1; ``n`` counts rows, ``n_cut`` those of them
    whose prompts were longer than the server takes and lost their beginning.
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


@dataclass(frozen=True)
class Answers:
    """What one model in one form answered to one task: per metric, per seed, one value per row."""

    model: str
    form: str
    task: Task
    values: Mapping[str, Mapping[int, Sequence[float]]]
    n_cut: int = 0

    def per_row(self, metric: str) -> list[float]:
        """Mean over the seeds, one value per row."""
        return [stats.mean(values) for values in zip(*self.values[metric].values(), strict=True)]


def gather(
    model: str, form: str, tasks: Sequence[Task], samples: Sequence[Any], cut: Mapping[str, set[int]] | None = None
) -> list[Answers]:
    """Sort samples (``client.Sample``) by task, metric and seed; their order within is that of the rows.

    ``cut`` holds the rows per task whose prompts did not fit.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for sample in samples:
        for metric, value in sample.metrics.items():
            found[sample.task][metric][sample.seed].append(value)
    return [Answers(model, form, task, found[task.name], len((cut or {}).get(task.name, ()))) for task in tasks]


def scores(answers: Sequence[Answers]) -> list[Score]:
    """Every metric of every task of every model."""
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
        )
        for a in answers
        for metric in a.values
    ]


def _headlines(answers: Sequence[Answers]) -> dict[str, dict[str, Answers]]:
    """Model to task to answers, in the order of appearance."""
    found: dict[str, dict[str, Answers]] = {}
    for a in answers:
        found.setdefault(a.model, {})[a.task.name] = a
    return found


def means(answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """Per model the unweighted mean of the tasks' headline metrics, with its standard error."""
    rows = []
    for model, tasks in _headlines(answers).items():
        value, error = stats.mean_over_tasks([a.per_row(a.task.headline) for a in tasks.values()])
        rows.append({"model": model, "value": value, "stderr": error, "tasks": list(tasks)})
    return rows


def comparisons(answers: Sequence[Answers]) -> list[dict[str, Any]]:
    """Every pair of models: McNemar per task and seed on the headline metric, bootstrap of the mean over tasks."""
    found = []
    for (first, ours), (second, theirs) in combinations(_headlines(answers).items(), 2):
        rows = {t: a.per_row(a.task.headline) for t, a in ours.items()}
        others = {t: a.per_row(a.task.headline) for t, a in theirs.items()}
        found.append(
            {
                "first": first,
                "second": second,
                "mean_difference": asdict(stats.paired_bootstrap(rows, others)),
                "tasks": [entry for t in ours for entry in _mcnemar(ours[t], theirs[t])],
            }
        )
    return found


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
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document; not-a-number (the standard error of one row) becomes null, as JSON has no such number."""
    write_atomically(path, json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value


def write_samples(path: Path, samples: Mapping[str, Sequence[Any]]) -> None:
    """One JSON line per model, task, seed and row."""
    lines = [
        json.dumps({"model": model, **asdict(sample)}, ensure_ascii=False) + "\n"
        for model, asked in samples.items()
        for sample in asked
    ]
    write_atomically(path, "".join(lines))
