"""What was fixed before a comparison began, kept beside its ledger: a change after results were seen is told."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.comparison.request import effect_of
from llamafactory_adaptive.comparison.task_request import points, points_of
from llamafactory_adaptive.files import read_json, write_atomically


STARTS_FILE = "starts.json"
_OF_TASKS = ("task-effect", "eval-limit", "eval-protocol", "eval-data", "eval-args")
_EFFECTS = {"effect": effect_of, "task-effect": points_of}


def note_start(folder: Path, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Add what this start fixes to those of before, unless it is what the last one fixed, and return all of them.

    Args:
        folder: the folder of the comparison.
        fixed: arguments that results should not have a say in, JSON-able.

    Raises:
        AdaptiveError: the file cannot be read or written.
    """
    path, now = folder / STARTS_FILE, json.loads(json.dumps(fixed))
    starts: list[dict[str, Any]] = read_json(path, str(path)) if path.is_file() else []
    if not starts or starts[-1] != now:
        starts.append(now)
        write_atomically(path, json.dumps(starts, indent=1) + "\n")
    return starts


def changes(starts: list[dict[str, Any]]) -> list[str]:
    """Describe what was changed between the starts of a comparison, one sentence each; empty where nothing was.

    What an earlier version did not note at a start counts as unchanged there, and how tasks are asked where none was.
    """
    said = []
    for key in starts[-1]:
        noted = (start for start in starts if key in start and (key not in _OF_TASKS or start.get("tasks", True)))
        values = [_number(key, start[key]) for start in noted]
        different = [value for number, value in enumerate(values) if number == 0 or value != values[number - 1]]
        if len(different) > 1:
            words = ", then ".join(_words(key, value) for value in different)
            said.append(f"--{key} was changed after the comparison had begun: {words}")
    return said


def _number(key: str, value: Any) -> Any:
    """Convert an effect to its number, however it was written: 0.5% and 0.005 are one; earlier versions kept text."""
    if key in _EFFECTS and isinstance(value, str):
        return _EFFECTS[key](value)
    return value


def _words(key: str, value: Any) -> str:
    if value is None:
        return "none"
    if key in _EFFECTS:
        return points(value) if key == "task-effect" else f"{100 * value:g} %"
    return ",".join(map(_plain, value)) if isinstance(value, list) else _plain(value)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
