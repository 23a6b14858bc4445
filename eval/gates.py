"""Conditions that a run must meet for exit code 0, for continuous integration. Pure logic: figures in, sentences out.

``--fail-under`` compares a model's headline figure with a number. ``--fail-if-worse-than`` compares two models on the
same rows: it fails where the second is worse by more than the margin and the two-sided p value of their difference
(sign flips over the rows of all tasks) is below 0.05, so that the noise of a few rows breaks no build.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


FAILED = 3  # the exit code
LEVEL = 0.05
MEAN = "mean"
_BASE = "base"


@dataclass(frozen=True)
class Floor:
    """The least percentage that a task's headline metric, or the mean over tasks, must reach."""

    task: str
    percent: float


@dataclass(frozen=True)
class Rival:
    """A model that none of the others may be worse than by more than ``margin`` points in the mean over tasks."""

    model: str
    margin: float


@dataclass(frozen=True)
class Gates:
    """All conditions of a run, and the models to which they apply."""

    floors: tuple[Floor, ...] = ()
    rivals: tuple[Rival, ...] = ()
    judged: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--fail-under`` and ``--fail-if-worse-than`` to a command line's parser."""
    group = parser.add_argument_group("conditions for exit code 0 (3 where one is not met; results are written)")
    group.add_argument("--fail-under", action="append", default=[], metavar="TASK=PERCENT", help="every model but the "
                       "base must reach this in the task's headline metric (TASK mean: in the mean over tasks); "
                       "repeatable, e.g. --fail-under gsm8k=35 --fail-under mean=50")  # fmt: skip
    group.add_argument("--fail-if-worse-than", action="append", default=[], metavar="MODEL[:POINTS]", help="no other "
                       "model but the base may be worse than MODEL in the mean over tasks, by more than POINTS "
                       "(default 0) and with p below 0.05; repeatable, e.g. --fail-if-worse-than base:1")  # fmt: skip


def parse(
    given: argparse.Namespace, models: Sequence[str], tasks: Sequence[str], base_row: bool = True
) -> tuple[Gates, list[str]]:
    """Parse the conditions from the options of :func:`add_arguments`, before anything starts.

    Args:
        given: the parsed command line.
        models: every model's name; an adapter and its merged form may share one.
        tasks: names of the tasks to be asked.
        base_row: whether the base is asked.

    Returns:
        The conditions, and the problems found in them, one sentence each.
    """
    names = [name for name in dict.fromkeys(models) if base_row or name != _BASE]
    judged = tuple(name for name in names if name != _BASE) or tuple(names)
    floors = [_floor(text, tasks) for text in given.fail_under]
    rivals = [_rival(text, names, judged) for text in given.fail_if_worse_than]
    gates = Gates(
        tuple(floor for floor in floors if isinstance(floor, Floor)),
        tuple(rival for rival in rivals if isinstance(rival, Rival)),
        judged,
    )
    return gates, [problem for problem in (*floors, *rivals) if isinstance(problem, str)]


def _floor(text: str, tasks: Sequence[str]) -> Floor | str:
    task, equals, value = text.rpartition("=")
    percent = _number(value)
    if not equals or percent is None or not 0 <= percent <= 100:
        return f"--fail-under {text}: it must be TASK=PERCENT, a number from 0 to 100; try --fail-under {MEAN}=50"
    if task != MEAN and task not in tasks:
        return f"--fail-under {text}: {task!r} is not asked; it must be {MEAN} or one of {', '.join(tasks)}"
    return Floor(task, percent)


def _rival(text: str, models: Sequence[str], judged: Sequence[str]) -> Rival | str:
    model, colon, value = text.partition(":")
    margin = _number(value) if colon else 0.0
    if margin is None or not 0 <= margin <= 100:
        return (
            f"--fail-if-worse-than {text}: POINTS must be a number from 0 to 100; try --fail-if-worse-than {model}:1"
        )
    if model not in models:
        return f"--fail-if-worse-than {text}: {model!r} is not asked; it must be one of {', '.join(models)}"
    if not [name for name in judged if name != model]:
        return f"--fail-if-worse-than {text}: there is no other model to compare; give --adapter or --merged too"
    return Rival(model, margin)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def failures(
    gates: Gates,
    scores: Sequence[Mapping[str, Any]],
    means: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
) -> list[str]:
    """List the conditions that are not met, one sentence each; empty when all are.

    Args:
        gates: the conditions.
        scores: as in the results file.
        means: as in the results file.
        comparisons: as in the results file.
    """
    return [*_under(gates, scores, means), *_worse(gates, comparisons)]


def _under(gates: Gates, scores: Sequence[Mapping[str, Any]], means: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    figures = {(score["model"], score["task"]): score["value"] for score in scores if score["headline"]}
    figures |= {(mean["model"], MEAN): mean["value"] for mean in means}
    for floor in gates.floors:
        for model in gates.judged:
            percent = 100 * figures[model, floor.task]
            if percent < floor.percent - 1e-9:
                what = "the mean over tasks" if floor.task == MEAN else floor.task
                yield f"{model} has {percent:.2f} % in {what}, less than the {floor.percent:g} % of --fail-under"


def _worse(gates: Gates, comparisons: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    differences: dict[tuple[str, str], tuple[float, float]] = {}
    for pair in comparisons:
        points, p = 100 * pair["mean_difference"]["value"], pair["mean_difference"]["p_value"]
        differences[pair["first"], pair["second"]] = points, p
        differences[pair["second"], pair["first"]] = -points, p
    for rival in gates.rivals:
        for model in gates.judged:
            if model == rival.model:
                continue
            points, p = differences[rival.model, model]
            if points < -rival.margin - 1e-9 and p < LEVEL:
                yield (
                    f"{model} is worse than {rival.model} by {-points:.2f} points in the mean over tasks, more than "
                    f"the {rival.margin:g} of --fail-if-worse-than (p {p:.3g}, below {LEVEL})"
                )
