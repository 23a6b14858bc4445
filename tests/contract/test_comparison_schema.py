"""docs/comparing.md's table of ``compare.json`` names what the code writes there, all of it and nothing else."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llamafactory_adaptive.bridge.comparison import Comparison
from llamafactory_adaptive.bridge.comparison_tasks import TaskEvaluations
from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.experiment import Design, Progress
from llamafactory_adaptive.comparison.task_results import task_document
from llamafactory_adaptive.comparison.task_scores import Answers


PAGE = Path(__file__).parents[2] / "docs" / "comparing.md"
ROWS = 30
# Their keys are names of the user's: settings, packages, tasks, modules.
OF_THE_USER = ("settings", "versions", "mean_ranks", "ranks", "questions", "metrics", "task_versions")
# What the table says in the same type, but is a value, or a name that keys a table of arms or tasks.
VALUES = {"lora", "random", "mean", "adapter", "merged", "form", "tasks", "--tasks"}


def outcome(run) -> dict[str, Any] | None:
    """``hot`` diverges everywhere, ``late`` has no seed that judges but one."""
    if run.arm == "hot" or (run.arm == "igu" and run.point.rate == 2.0 and run.seed == 2):
        return {"status": "diverged"}
    losses = np.random.default_rng((run.seed, len(run.arm))).normal(2.0, 0.1, ROWS) + abs(run.point.rate - 2.0)
    return {"status": "done", "dev": losses.tolist(), "test": losses.tolist(), "seconds": 3.0, "steps": 4,
            "parameters": 100, "parameters_of_one_rank": 10, "ranks": {"model.layers.0.q_proj": 4}}  # fmt: skip


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """What the command writes, from outcomes and answers that are made up."""
    arms = [Arm(name, {"finetuning_type": "lora"}) for name in ("lora", "random", "igu", "hot", "broken")]
    design = Design((1.0, 2.0), seeds=2, extensions=0)
    progress = Progress(design, arms, lambda run: None if run.arm == "broken" else outcome(run),
                        lambda found, half: np.mean(found[half]))  # fmt: skip
    progress.failed |= {"broken": "out of memory"}
    tokens = {half: np.full(ROWS, 3) for half in ("dev", "test")}
    comparison: Any = SimpleNamespace(tokens=tokens, given={"lora_rank": 8}, versions={"torch": "2"}, design=design,
                                      split={"train": 9})  # fmt: skip
    made = Comparison.document(comparison, progress, 0.005, "compare", [])
    boolq = {"questions": 40, "commonest_share": 0.6, "metric": "acc", "version": 1}
    facts = {"tasks": {"boolq": boolq}, "versions": {"vllm": "1"},
             "settings": {"protocol": "lm_eval", "limit": None}}  # fmt: skip
    request = SimpleNamespace(tasks=("boolq",), effect=0.01)
    harness = SimpleNamespace(sign_flip=lambda: None)
    asked: Any = SimpleNamespace(_all=lambda progress: [], _reservations=lambda progress: [], facts=facts, failed={},
                                 request=request, form="adapter", harness=harness, _asked=dict)  # fmt: skip
    answers = {
        name: Answers((1, 2), {task: np.eye(2, 40) for task in ("boolq", "arc_easy")}) for name in ("lora", "igu")
    }
    told = task_document(answers, {"hot": "no server"}, 0.01, lambda *given: 1.0, {})
    return {**made, "tasks": {**TaskEvaluations.document(asked, progress), **told}}


def emitted(document: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, set[str]]]:
    """Yield the keys that a row of the table is about, each with the names of all keys below it."""
    for key, value in document.items():
        if key == "arms":
            for arm in value:
                yield from emitted(arm, f"{start}arms[].")
        elif key == "tasks" and not start:
            yield key, set()
            yield from emitted(value, "tasks.")
        else:
            path = f"{start}{key}"
            yield path, set() if key in OF_THE_USER else set(names_below(value)) - VALUES


def names_below(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for each in value:
            yield from names_below(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from names_below(each)


def documented() -> Iterator[tuple[list[str], set[str]]]:
    """Yield the keys of each row of the table, and the names that the row explains them with."""
    table = PAGE.read_text(encoding="utf-8").partition("| key | what it holds |\n")[2].partition("\n\n")[0]
    for line in table.splitlines()[1:]:
        keys, said = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("| ").split(" | ", 1))
        start = keys[0].rpartition(".")[0]
        yield [start + key if key.startswith(".") else key for key in keys], set(said)


def test_the_table_names_every_key_that_is_written_and_no_other(document):
    written = {key for key, _ in emitted(document)}
    assert sorted(key for keys, _ in documented() for key in keys) == sorted(written)


def test_a_row_explains_every_key_below_its_own_and_no_other(document):
    below: dict[str, set[str]] = {}
    for key, names in emitted(document):
        below.setdefault(key, set()).update(names)
    for keys, said in documented():
        names = set().union(*(below[key] for key in keys))
        tasks = {"boolq", "arc_easy"}
        assert names - tasks - said == set(), f"not explained beside {keys[0]}"
        assert said - names - VALUES == set(), f"explained beside {keys[0]}, and not written"
