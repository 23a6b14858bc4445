"""The interface to lm-evaluation-harness: tasks with their rows, the evaluation of a served model, its samples.

Only this file and ``served.py`` import lm_eval; both are imported once the cheap checks have passed.
"""

import hashlib
import json
import logging
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from eval.data import read_splits
from eval.decoding import Decoding, Prompting
from eval.errors import EvalError
from eval.protocols import Task, task_config
from eval.redaction import clean
from eval.served import Asking, ServedModel


_FEW_CHOICES = 10


@dataclass(frozen=True)
class Sample:
    """One row of one task, asked once: the prompt, the response, and the value of every metric.

    Attributes:
        repeat: index of this answer among several sampled ones to the same question, from 0.
        response: the text, or the log-likelihood of each choice.
        extracted: for generated answers, what each filter of lm-evaluation-harness left, by the filter's name.
    """

    task: str
    seed: int
    row: int
    repeat: int = field(kw_only=True, default=0)
    question: str
    prompt: str
    target: str
    response: Any
    metrics: Mapping[str, float]
    extracted: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """Answers of one model: samples, the number of requests, and the seconds that they took.

    Attributes:
        cut: per task, the rows whose prompts were longer than the server takes and lost their beginning.
        requests: number of questions, including those with a stored answer.
        fresh: number of questions that were sent to the server.
    """

    samples: list[Sample] = field(default_factory=list)
    cut: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    requests: int = 0
    fresh: int = 0
    seconds: float = 0.0


class Warnings(logging.Handler):
    """Log handler that keeps the warnings of lm-evaluation-harness, each once and cleaned of secrets.

    Those about cut prompts are left out: cut rows are counted elsewhere. A message with the ``repr`` of an exception
    may hold the headers of a request: only the exception's name and HTTP status are kept of it.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Store the message of a log record for the results file, unless it is there already."""
        message = clean(record.getMessage())
        if failed := re.match(r"Exception:\s*(\w+)(?:.*?status=(\d+))?", message, re.S):
            message = " ".join(filter(None, ("a request failed:", *failed.groups())))
        if "eft truncat" not in message and message not in self.texts:
            self.texts.append(message)


def quiet() -> Warnings:
    """Keep log messages of the libraries off the screen.

    Returns:
        The handler that collects the warnings of lm-evaluation-harness.
    """
    words = Warnings()
    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [words], False
    logger.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # every request under way fails when a server dies
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return words


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """A task whose rows come from local files that were checked, in place of a data set of the hub."""

    def __init__(self, config: dict[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self._rows = rows
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None, **more: Any) -> None:
        """Build the data set from the local rows; nothing is downloaded."""
        self.dataset = {split: datasets.Dataset.from_list(list(rows)) for split, rows in self._rows.items()}


def load(
    tasks: Sequence[Task],
    template: str,
    files: Mapping[str, Mapping[str, Path]] | None,
    strip_thinking: bool = False,
) -> list[Any]:
    """Load tasks with their rows, from local files or from the hub.

    Raises:
        EvalError: the hub cannot be reached, or a data set cannot be read.
    """
    loaded = []
    for task in tasks:
        local = None if files is None else files[task.name]
        try:
            config = task_config(task, template, local, strip_thinking)
            made = ConfigurableTask(config=config) if local is None else LocalTask(config, read_splits(local))
            loaded.append(made)
        except (OSError, ValueError, TypeError, OverflowError, datasets.exceptions.DatasetGenerationError) as error:
            where = "--data-dir" if files else f"{task.config['dataset_path']}, try --data-dir for local rows"
            raise EvalError(f"the rows of {task.name} cannot be loaded ({where}): {error}") from error
    return loaded


def questions(task: Task, loaded: Any, limit: int | None) -> list[str]:
    """List the texts that identify the rows to be scored."""
    return [str(row[task.question]) for row in _scored(loaded, limit)]


def scored_digest(loaded: Any, limit: int | None) -> str:
    """Compute the SHA-256 of the rows to be scored as the task reads them: one JSON line each, keys sorted, UTF-8."""
    digest = hashlib.sha256()
    for row in _scored(loaded, limit):
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def commonest_share(loaded: Any, limit: int | None) -> float | None:
    """Compute how often the commonest answer is right, for who gives no other; None where answers are no few choices.

    A model that learned nothing of a task but how often its answers occur reaches as much.
    """
    counts = Counter(str(loaded.doc_to_target(row)) for row in _scored(loaded, limit))
    return max(counts.values()) / counts.total() if 0 < len(counts) <= _FEW_CHOICES else None


def _scored(loaded: Any, limit: int | None) -> Any:
    rows = loaded.eval_docs
    return rows.select(range(min(limit or len(rows), len(rows))))


def ask_model(
    asking: Asking,
    tasks: Sequence[Task],
    loaded: Sequence[Any],
    seeds: Sequence[int],
    limit: int | None,
    decoding: Decoding,
    prompting: Prompting,
) -> Asked:
    """Ask one served model every task.

    Args:
        asking: the model and its server, with the answers that are stored already.
        tasks: what to ask, with ``loaded`` beside each.
        loaded: the tasks with their rows.
        seeds: one round per seed; tasks without examples have nothing to draw and are asked in the first round alone.
        limit: number of rows per task, the first ones; None for all.
        decoding: how answers are generated. Only generated answers are asked for repeatedly.
        prompting: system message and chat template around the questions.
    """
    asked = Asked()
    for number, seed in enumerate(seeds):
        for repeat in range(decoding.repeats):
            now = [
                (task, made)
                for task, made in zip(tasks, loaded, strict=True)
                if (task.fewshot or number == 0) and not (task.likelihood and repeat)
            ]
            if now:
                served = ServedModel(asking, decoding, prompting, seed, repeat)
                _one_round(asked, served, now, limit)
    return asked


def _one_round(asked: Asked, served: ServedModel, pairs: Sequence[tuple[Task, Any]], limit: int | None) -> None:
    started, chat = time.perf_counter(), served.prompting.chat
    answer = simple_evaluate(
        model=served,
        tasks=[loaded for _, loaded in pairs],
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        system_instruction=served.prompting.system,
        gen_kwargs=served.decoding.options(),
        random_seed=served.seed,
        numpy_random_seed=served.seed,
        torch_random_seed=served.seed,
        fewshot_random_seed=served.seed,
        task_manager=TaskManager(include_defaults=False),
    )
    asked.seconds += time.perf_counter() - started
    asked.fresh += served.fresh
    for name, rows in served.cut.items():
        asked.cut[name] |= rows
    for task, _ in pairs:
        samples = list(_samples(task, served.seed, served.repeat, answer["samples"][task.name]))
        asked.samples += samples
        asked.requests += sum(len(sample.response) if task.likelihood else 1 for sample in samples)


def _samples(task: Task, seed: int, repeat: int, logged: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Build one sample per row from the log of lm-evaluation-harness, which has one entry per row and filter.

    The metrics of a named filter get its name as a suffix.
    """
    metrics: dict[int, dict[str, float]] = defaultdict(dict)
    extracted: dict[int, dict[str, str]] = defaultdict(dict)
    first: dict[int, Mapping[str, Any]] = {}
    for entry in logged:
        row = entry["doc_id"]
        first.setdefault(row, entry)
        suffix = "" if entry["filter"] == "none" else f",{entry['filter']}"
        metrics[row] |= {f"{name}{suffix}": float(entry[name]) for name in entry["metrics"]}
        if not task.likelihood:
            extracted[row][entry["filter"]] = str(entry["filtered_resps"][0])
    return [
        Sample(
            task=task.name,
            seed=seed,
            row=row,
            repeat=repeat,
            question=str(entry["doc"][task.question]),
            prompt=entry["arguments"][0][0],
            target=str(entry["target"]),
            response=[r[0][0] for r in entry["resps"]] if task.likelihood else entry["resps"][0][0],
            metrics=metrics[row],
            extracted=extracted[row],
        )
        for row, entry in sorted(first.items())
    ]
