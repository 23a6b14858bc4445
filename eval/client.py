"""The seam to lm-evaluation-harness: a served model as its ``local-completions`` model, its tasks, its samples.

The only file that imports lm_eval, and it is imported only once the cheap checks have passed.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import datasets
import requests
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from eval.data import read_splits
from eval.errors import EvalError
from eval.protocols import Task, task_config


# A dead server is noticed at once; this bounds a hanging one. Answers of many rows at a time take minutes on a CPU.
_REQUEST_SECONDS = 3600
CONNECTION_ERRORS = (aiohttp.ClientError, requests.RequestException, asyncio.TimeoutError, ConnectionError)


@dataclass(frozen=True)
class Sample:
    """One row of one task, asked once: what was shown, what came back, and every metric's value.

    ``response`` is the text, or the log-likelihood of each choice.
    """

    task: str
    seed: int
    row: int
    question: str
    prompt: str
    target: str
    response: Any
    metrics: Mapping[str, float]
    repeat: int = 0
    extracted: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """What one model answered: samples, and how many requests took how long.

    ``cut`` holds, per task, the rows whose prompts were longer than the server takes and lost their beginning.
    """

    samples: list[Sample] = field(default_factory=list)
    cut: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    requests: int = 0
    seconds: float = 0.0


class ServedModel(LocalCompletionsAPI):  # type: ignore[misc]
    """lm-evaluation-harness's ``local-completions`` against one name on one server.

    Adds the tokenizer's own start token to raw text, as ``hf`` and ``vllm`` of the harness do, and beam search, for
    which a server returns every beam and knows no stop words. Remembers in ``cut`` which rows of which task were
    longer than the server takes: the harness cuts their beginning and warns at most.
    """

    def __init__(self, url: str, name: str, tokenizer: str, max_length: int, seed: int, **options: Any) -> None:
        self.cut: dict[str, set[int]] = defaultdict(set)
        self._scored: list[Instance] = []
        self._beams, chat = options.pop("num_beams"), options.pop("chat")
        super().__init__(
            base_url=f"{url}/v1/completions",
            model=name,
            tokenizer=tokenizer,
            tokenizer_backend="huggingface",
            revision=None,
            max_length=max_length,
            seed=seed,
            timeout=_REQUEST_SECONDS,
            num_concurrent=options.pop("concurrency"),
        )
        start = self.tokenizer("").input_ids
        self.add_bos_token = bool(start) and not chat  # a chat template writes its own

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in cached requests, which this harness does not keep."""
        return str(self.tokenizer.name_or_path)

    def parse_generations(self, outputs: Any, **more: Any) -> list[str]:
        """The texts of a response; of beams only the best, which comes first."""
        texts: list[str] = LocalCompletionsAPI.parse_generations(outputs, **more)
        return texts[:: self._beams]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate; after beam search, cut each text at its first stop word."""
        prompts = self.tok_encode([r.args[0] for r in requests], add_special_tokens=self.add_bos_token)
        for request, prompt in zip(requests, prompts, strict=True):
            self._count(request, len(prompt) + request.args[1].get("max_gen_toks", self._max_gen_toks))
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        if self._beams == 1:
            return texts
        return [cut(text, request.args[1].get("until") or []) for text, request in zip(texts, requests, strict=True)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Likelihoods of continuations; the rows are kept for counting, as the tokens come without them."""
        self._scored = requests
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], **more: Any) -> list[tuple[float, bool]]:
        for request, (_, context, continuation) in zip(self._scored, requests, strict=True):
            self._count(request, len(context) + len(continuation))
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **more)
        return answers

    def _count(self, request: Instance, tokens: int) -> None:
        if tokens > self.max_length:
            self.cut[request.task_name].add(request.doc_id)


def cut(text: str, stops: Sequence[str]) -> str:
    """``text`` up to the first of its stop words."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class LastWords(logging.Handler):
    """Keeps the warnings of lm-evaluation-harness.

    Attributes:
        last: the last one that carries the server's own words about a bad request.
        warnings: the others, each once; those about cut prompts are counted row by row elsewhere.
    """

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.last = ""
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Remember a record."""
        message = record.getMessage()
        if "API request failed" in message:
            self.last = message
        elif "eft truncat" not in message and message not in self.warnings:
            self.warnings.append(message)


def quiet() -> LastWords:
    """Keep what the libraries log off the screen; their progress bars stay."""
    words = LastWords(logging.WARNING)
    logger = logging.getLogger("lm_eval")
    logger.handlers, logger.propagate = [words], False
    logger.setLevel(logging.WARNING)
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # every request under way fails when a server dies
    return words


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """A task on rows that were read and checked here, in place of a set of the hub."""

    def __init__(self, config: dict[str, Any], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        self._rows = rows
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None, **more: Any) -> None:
        """Make a data set of the rows."""
        self.dataset = {split: datasets.Dataset.from_list(list(rows)) for split, rows in self._rows.items()}


def load(
    tasks: Sequence[Task],
    template: str,
    files: Mapping[str, Mapping[str, Path]] | None,
    strip_thinking: bool = False,
) -> list[Any]:
    """Tasks with their data loaded, from local files or from the hub.

    Raises:
        EvalError: the hub cannot be reached, or a set cannot be read.
    """
    loaded = []
    for task in tasks:
        local = None if files is None else files[task.name]
        try:
            config = task_config(task, template, local, strip_thinking)
            made = ConfigurableTask(config=config) if local is None else LocalTask(config, read_splits(local))
            loaded.append(made)
        except (OSError, ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
            where = "--data-dir" if files else f"{task.config['dataset_path']}, try --data-dir for local rows"
            raise EvalError(f"the rows of {task.name} cannot be loaded ({where}): {error}") from error
    return loaded


def check_tokenizers(places: Iterable[str], template: str) -> None:
    """Load every tokenizer once, before any server starts.

    Raises:
        EvalError: it cannot be had, or has no chat template where one is asked for.
    """
    for place in sorted(places):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if "trust_remote_code" in str(error):
                raise EvalError(
                    f"the tokenizer of {place} needs code that comes with it, which is never run; evaluate a copy "
                    "with a tokenizer of transformers"
                ) from error
            first = str(error).strip().splitlines()[0]
            raise EvalError(f"the tokenizer of {place} cannot be loaded: {first}") from error
        if template == "training" and tokenizer.chat_template is None:
            raise EvalError(f"--template training: {place} has no chat template; use --template none")


def questions(task: Task, loaded: Any, limit: int | None) -> list[str]:
    """The texts that identify the rows to be scored."""
    return [str(row[task.question]) for row in _scored(loaded, limit)]


def scored_digest(loaded: Any, limit: int | None) -> str:
    """SHA-256 of the rows to be scored as the task sees them: one JSON line each, keys sorted, UTF-8."""
    found = hashlib.sha256()
    for row in _scored(loaded, limit):
        found.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return found.hexdigest()


def _scored(loaded: Any, limit: int | None) -> Any:
    rows = loaded.eval_docs
    return rows.select(range(min(limit or len(rows), len(rows))))


def ask_model(
    model: Mapping[str, Any],
    tasks: Sequence[Task],
    loaded: Sequence[Any],
    seeds: Sequence[int],
    limit: int | None,
    chat: bool,
) -> Asked:
    """Ask one served model every task.

    Args:
        model: arguments of :class:`ServedModel` but seed and chat.
        tasks: what to ask, with ``loaded`` beside each.
        loaded: the tasks with their data.
        seeds: one round per seed; tasks without examples have nothing to draw and are asked in the first round alone.
        limit: rows per task, the first ones.
        chat: put questions (and examples, as turns) into the chat template.
    """
    asked = Asked()
    for number, seed in enumerate(seeds):
        now = [(task, made) for task, made in zip(tasks, loaded, strict=True) if task.fewshot or number == 0]
        if now:
            _one_round(asked, model, now, seed, limit, chat)
    return asked


def _one_round(
    asked: Asked, model: Mapping[str, Any], pairs: Sequence[tuple[Task, Any]], seed: int, limit: int | None, chat: bool
) -> None:
    beams = model["num_beams"]
    served = ServedModel(**model, seed=seed, chat=chat)
    started = time.perf_counter()
    answer = simple_evaluate(
        model=served,
        tasks=[loaded for _, loaded in pairs],
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        gen_kwargs={"use_beam_search": True, "n": beams} if beams > 1 else None,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        task_manager=TaskManager(include_defaults=False),
    )
    asked.seconds += time.perf_counter() - started
    for name, rows in served.cut.items():
        asked.cut[name] |= rows
    for task, _ in pairs:
        samples = list(_samples(task, seed, answer["samples"][task.name]))
        asked.samples += samples
        asked.requests += sum(len(sample.response) if task.likelihood else 1 for sample in samples)


def _samples(task: Task, seed: int, logged: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """One sample per row; the harness logs one per row and filter, whose metrics carry the filter's name."""
    metrics: dict[int, dict[str, float]] = defaultdict(dict)
    first: dict[int, Mapping[str, Any]] = {}
    for entry in logged:
        first.setdefault(entry["doc_id"], entry)
        suffix = "" if entry["filter"] == "none" else f",{entry['filter']}"
        metrics[entry["doc_id"]] |= {f"{name}{suffix}": float(entry[name]) for name in entry["metrics"]}
    return [
        Sample(
            task=task.name,
            seed=seed,
            row=row,
            question=str(entry["doc"][task.question]),
            prompt=entry["arguments"][0][0],
            target=str(entry["target"]),
            response=[r[0][0] for r in entry["resps"]] if task.likelihood else entry["resps"][0][0],
            metrics=metrics[row],
        )
        for row, entry in sorted(first.items())
    ]
