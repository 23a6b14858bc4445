"""Reader of a finished run's folder: its figures, and its samples gathered as in the run itself.

Folders come from other machines and other people, so everything is checked: a damaged file, or samples that do not
give the figures, raise an EvalError.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from eval.errors import EvalError
from eval.protocols import PROTOCOLS, Task
from eval.reading import MAX_SAMPLE, field, numbered_rows, read_object
from eval.results import RESULTS_FILE, SAMPLES_FILE, SCHEMA_VERSION, Answers, Score, gather


_NAME = re.compile(r"[\w.-]{1,200}")
_TYPES: dict[type, type | tuple[type, ...]] = {float: (int, float), bool: bool, int: int, str: str}
_AGREE = 1e-9  # largest gap between a figure and the mean of its samples


@dataclass(frozen=True)
class Finished:
    """Figures and samples of one finished run.

    Attributes:
        label: prefix of the models' names, which tells the runs apart.
        document: the results file.
        scores: the figures, with the label in the models' names.
        answers: per model (named in the same way) and task, the values of the headline metric, one per row.
    """

    path: Path
    label: str
    document: Mapping[str, Any]
    scores: tuple[Score, ...]
    answers: Mapping[str, Mapping[str, Answers]]


def read_finished(path: Path, label: str) -> Finished:
    """Read and check the folder of a finished run.

    Raises:
        EvalError: results or samples are missing, damaged or of another version, or do not fit each other.
    """
    file = path / RESULTS_FILE
    document = read_object(file)
    if document.get("schema_version") != SCHEMA_VERSION:
        raise EvalError(
            f"{file}: schema_version is {document.get('schema_version')!r:.40}, this harness reads {SCHEMA_VERSION}; "
            "run the evaluation again"
        )
    if document.get("protocol") not in PROTOCOLS:
        raise EvalError(f"{file}: protocol is {document.get('protocol')!r:.40}, it must be {' or '.join(PROTOCOLS)}")
    scores = [_score(entry, document["protocol"], str(file)) for entry in field(document, "scores", list, str(file))]
    headlines = {(score.model, score.task): score for score in scores if score.headline}
    if not headlines:
        raise EvalError(f"{file}: it holds no figures")
    answers = _answers(path / SAMPLES_FILE, headlines)
    _check(headlines, answers, path)
    named = {f"{label}:{model}": tasks for model, tasks in answers.items()}
    return Finished(path, label, document, tuple(_named(score, label) for score in scores), named)


def _named(score: Score, label: str) -> Score:
    return Score(**{**vars(score), "model": f"{label}:{score.model}"})


def _score(entry: Any, protocol: str, where: str) -> Score:
    if not isinstance(entry, dict):
        raise EvalError(f"{where}: an entry of scores is {type(entry).__name__}, it must be an object")
    known = {one.name: one.type for one in fields(Score)}
    values = {name: field(entry, name, _TYPES[kind], where) for name, kind in known.items()  # type: ignore[index]
              if name != "stderr"}  # fmt: skip
    for name in ("model", "form", "task"):
        if not _NAME.fullmatch(values[name]):
            raise EvalError(
                f"{where}: {name} is {values[name]!r:.60}, it must be of letters, digits, '.', '_' and '-'"
            )
    for name in ("task_version", "metric"):
        if not values[name].isprintable() or len(values[name]) > 200:
            raise EvalError(f"{where}: {name} is {values[name]!r:.60}, which is no short printable text")
    if values["protocol"] != protocol or values["n"] < 1:
        raise EvalError(f"{where}: a score is of protocol {values['protocol']!r:.40} with {values['n']} rows")
    stderr = None if entry.get("stderr") is None else field(entry, "stderr", (int, float), where)
    return Score(**values, stderr=float("nan") if stderr is None else stderr)


def _answers(path: Path, headlines: Mapping[tuple[str, str], Score]) -> dict[str, dict[str, Answers]]:
    """Gather the samples of every model and task; of their metrics only the headline one is kept."""
    samples_by_key: dict[tuple[str, str], list[Any]] = {key: [] for key in headlines}
    seen = set()
    if not path.is_file():
        raise EvalError(f"{path} does not exist: rows are compared one by one; run the evaluation with --log-samples")
    for number, line in numbered_rows(path, MAX_SAMPLE):
        where = f"{path}:{number}"
        key = field(line, "model", str, where), field(line, "task", str, where)
        if key not in headlines:
            raise EvalError(f"{where}: model {key[0]!r:.60} and task {key[1]!r:.60} are not in {RESULTS_FILE}")
        sample = _sample(line, headlines[key].metric, where)
        sample_key = (*key, sample.seed, sample.row, sample.repeat)
        if sample_key in seen:
            raise EvalError(f"{where}: row {sample.row} of {key[1]} stands in this file twice")
        seen.add(sample_key)
        samples_by_key[key].append(sample)
    answers: dict[str, dict[str, Answers]] = {}
    for (model, task), samples in samples_by_key.items():
        score = headlines[model, task]
        answers.setdefault(model, {})[task] = gather(model, score.form, [_task(score)], samples)[0]
    return answers


def _sample(line: Mapping[str, Any], metric: str, where: str) -> SimpleNamespace:
    numbers = {name: field(line, name, int, where) for name in ("seed", "row", "repeat")}
    value = field(field(line, "metrics", dict, where), metric, (int, float), where)
    return SimpleNamespace(task=line["task"], metrics={metric: float(value)}, extracted={}, **numbers)


def _task(score: Score) -> Task:
    """Build a task with only what its answers need, from a score of it.

    The task's own file is not read: it may be of another version here, or missing.
    """
    return Task(
        name=score.task,
        protocol=score.protocol,
        version=score.task_version,
        likelihood=False,
        headline=score.metric,
        fewshot=score.fewshot,
        fields=(),
        question="",
        problem_with=lambda row: None,
        reads=None,
        config={},
    )


def _check(
    headlines: Mapping[tuple[str, str], Score], answers: Mapping[str, Mapping[str, Answers]], path: Path
) -> None:
    for (model, task), score in headlines.items():
        seeds = answers[model][task].values.get(score.metric, {})
        counts = {len(values) for values in seeds.values()}
        rows = answers[model][task].per_row(score.metric) if counts == {score.n} else []
        if not rows or abs(sum(rows) / len(rows) - score.value) > _AGREE:
            raise EvalError(
                f"{path}: {SAMPLES_FILE} is not that of {RESULTS_FILE}: {model}, {task} has {score.n} rows with "
                f"{100 * score.value:.2f} % there; was one of the files replaced?"
            )
