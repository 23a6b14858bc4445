"""The two protocols: the tasks of each, read from ``tasks/PROTOCOL/TASK.yaml``, and how rows get into them.

``lm_eval`` asks as lm-evaluation-harness does; ``llm_adapters`` asks and parses as the PEFT papers do. Their figures
are not comparable, so one run has one protocol. A task file is an ordinary lm-evaluation-harness task; its
``metadata`` holds the version and what this harness needs besides (see ``README.md``).
"""

import difflib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from eval.errors import UsageError
from eval.extraction import thinking_filter


FOLDER = Path(__file__).parent / "tasks"
PROTOCOLS = ("lm_eval", "llm_adapters")
TEMPLATES = ("none", "training")
LOCAL = "local rows"  # takes the place of the name of a data set of the hub
_WHOLE_TEXT = {"name": "none", "filter": [{"function": "take_first"}]}  # the filter of tasks that name none
# The instruction prompt of Stanford Alpaca, which the adapter papers train and test with.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Task:
    """One task of one protocol.

    Attributes:
        version: changes whenever an edit of the task could change a figure.
        likelihood: answers are scored by their likelihood; otherwise the model generates and its text is parsed.
        headline: the metric that stands for the task in the mean and in comparisons.
        fewshot: number of examples before the question, drawn from the training rows.
        fields: fields that a row of a local file must have; ``a|b`` asks for one of two.
        question: the field that identifies a row for the contamination guard.
        problem_with: returns what is wrong with the values of a row, or None.
        reads: returns what each metric reads in a response, where the task parses text by itself; else None.
        config: the task file as lm-evaluation-harness takes it.
    """

    name: str
    protocol: str
    version: str
    likelihood: bool
    headline: str
    fewshot: int
    fields: tuple[str, ...]
    question: str
    problem_with: Callable[[Mapping[str, Any]], str | None]
    reads: Callable[[str], Mapping[str, str]] | None
    config: Mapping[str, Any]


class _TaskLoader(yaml.SafeLoader):
    """Safe YAML loader that also resolves lm-evaluation-harness's ``!function package.module.name``."""


_TaskLoader.add_constructor(
    "!function",
    lambda loader, node: pkgutil.resolve_name(str(loader.construct_scalar(node))),  # type: ignore[arg-type]
)


def task_names(protocol: str) -> list[str]:
    """List the names of a protocol's tasks in alphabetical order."""
    return sorted(path.stem for path in (FOLDER / protocol).glob("*.yaml"))


def load_tasks(protocol: str, names: Sequence[str]) -> list[Task]:
    """Load tasks of a protocol by their names.

    Raises:
        UsageError: names are unknown (each is listed with the nearest known one) or repeated.
    """
    known, problems = task_names(protocol), []
    for name in dict.fromkeys(names):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"--tasks: {name!r} is no task of {protocol}: {', '.join(known)}{hint}")
        elif names.count(name) > 1:
            problems.append(f"--tasks: {name} is named {names.count(name)} times")
    if problems:
        raise UsageError(problems)
    return [_read(protocol, name) for name in names]


def _read(protocol: str, name: str) -> Task:
    text = (FOLDER / protocol / f"{name}.yaml").read_text(encoding="utf-8")
    config = yaml.load(text, _TaskLoader)  # a safe loader with one constructor, on our own files
    facts = config["metadata"]
    problem_with = facts.pop("problem", lambda row: None)  # lm-evaluation-harness takes plain values here
    reads = facts.pop("reads", None)
    return Task(
        name=name,
        protocol=protocol,
        version=str(facts["version"]),
        likelihood=config["output_type"] == "multiple_choice",
        headline=facts["headline"],
        fewshot=config.get("num_fewshot", 0),
        fields=tuple(facts["fields"]),
        question=facts["question"],
        problem_with=problem_with,
        reads=reads,
        config=config,
    )


def with_fewshot(task: Task, examples: int) -> Task:
    """Return ``task`` with another number of examples before its question, drawn from its training rows."""
    drawn = {"training_split": "train", "fewshot_split": "train"} if examples else {}
    return replace(task, fewshot=examples, config={**drawn, **task.config, "num_fewshot": examples})


def task_config(
    task: Task, template: str, files: Mapping[str, Path] | None, strip_thinking: bool = False
) -> dict[str, Any]:
    """Build the configuration of a task for lm-evaluation-harness, with local rows and the papers' prompt as needed.

    Args:
        task: the task.
        template: ``training`` leaves the instruction bare, for the chat template to wrap.
        files: ``test`` and, where examples are shown, ``train``; None for the hub.
        strip_thinking: whether ``<think>`` blocks are removed from responses before anything is read in them.
    """
    config = dict(task.config)
    if files is not None:
        train = "train" if "train" in files else None
        config |= {
            "dataset_path": LOCAL,
            "dataset_name": None,
            "training_split": train,
            "fewshot_split": train,
            "validation_split": None,
            "test_split": "test",
        }
    if strip_thinking and not task.likelihood:
        config["filter_list"] = [_after_thinking(named) for named in config.get("filter_list", [_WHOLE_TEXT])]
    if task.protocol == "llm_adapters" and template == "none":
        config["doc_to_text"] = ALPACA.replace("{instruction}", config["doc_to_text"])
    return config


def _after_thinking(named: Mapping[str, Any]) -> dict[str, Any]:
    """Put the stripping of thinking before the first step of one of lm-evaluation-harness's named filters."""
    return {**named, "filter": [{"function": "custom", "filter_fn": thinking_filter}, *named["filter"]]}
