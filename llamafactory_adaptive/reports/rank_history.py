"""Mean rank of each module type over the optimizer steps of a run, from the lines of its log."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.files import LOG_FILE, read_lines
from llamafactory_adaptive.ranks.module_names import module_type


@dataclass(frozen=True)
class RankHistory:
    """Mean rank of each module type after every change of ranks.

    Attributes:
        steps: optimizer steps, ascending; the first is that of the start, if the log holds its ranks.
        means: mean rank at each of these steps, by module type.
    """

    steps: tuple[int, ...]
    means: Mapping[str, tuple[float, ...]]


def read_rank_history(folder: Path, names: Sequence[str] | None = None) -> RankHistory | None:
    """Read how ranks changed in a run that searches for them; None where its log holds no change.

    Works while the run trains, too.

    Args:
        folder: ``output_dir`` of the run.
        names: names of all modules of its plan; by default those in the log, which earlier versions left out.

    Raises:
        PlanError: the log cannot be read.
    """
    if not (folder / LOG_FILE).is_file():
        return None
    changes: dict[int, Sequence[int]] = {}
    for line in parsed_lines(read_lines(folder / LOG_FILE)):
        if not isinstance(line.get("step"), int):
            continue
        if line.get("event") in ("begin", "resumed"):
            changes = {step: ranks for step, ranks in changes.items() if step <= line["step"]}
            names = names or _list_of(str, line.get("modules"))
        if _list_of(int, line.get("ranks")):
            changes[line["step"]] = line["ranks"]
    return rank_history(names, changes) if names else None


def rank_history(names: Sequence[str], changes: Mapping[int, Sequence[int]]) -> RankHistory | None:
    """Average ranks by module type; None where there are none, or they are not those of these modules.

    Args:
        names: names of all modules.
        changes: their ranks, by optimizer step.
    """
    steps = sorted(changes)
    if not steps or any(len(changes[step]) != len(names) for step in steps):
        return None
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(module_type(name), []).append(place)
    means = {
        kind: tuple(sum(changes[step][place] for place in mine) / len(mine) for step in steps)
        for kind, mine in places.items()
    }
    return RankHistory(tuple(steps), means)


def _list_of(kind: type, value: Any) -> Any:
    """Return ``value`` if it is a list of that kind alone; None otherwise."""
    return value if isinstance(value, list) and all(isinstance(entry, kind) for entry in value) else None


def parsed_lines(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Parse the lines of a run's log, and leave out what is damaged."""
    parsed = []
    for line in lines:
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(document, dict):
            parsed.append(document)
    return parsed
