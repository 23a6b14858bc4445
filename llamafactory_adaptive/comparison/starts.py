"""What was fixed before a comparison began, kept beside its ledger: a change after results were seen is told."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.files import read_json, write_atomically


STARTS_FILE = "starts.json"


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
    """Describe what was changed between the starts of a comparison, one sentence each; empty where nothing was."""
    said = []
    for key in starts[-1]:
        values = [start.get(key) for start in starts]
        different = [value for number, value in enumerate(values) if number == 0 or value != values[number - 1]]
        if len(different) > 1:
            words = ", then ".join(map(_words, different))
            said.append(f"--{key} was changed after the comparison had begun: {words}")
    return said


def _words(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
