"""The ledger of a comparison: what came of each finished run, by the settings it came from."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import first_of, refuse
from llamafactory_adaptive.files import append_line, read_lines


LEDGER = "ledger.jsonl"  # in the folder of a comparison


class Ledger:
    """Results by the settings they came from, one JSON line each; what stands there is not computed again.

    A line that a kill cut short is dropped. Threads may share one. One process at a time writes to the file.

    Args:
        path: file of the lines; it need not exist.

    Raises:
        AdaptiveConfigError: lines hold something else than results.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        read = [_entry(line) for line in read_lines(path)] if path.exists() else []
        if bad := [f"line {number}" for number, entry in enumerate(read, 1) if entry is None]:
            reason = f"the file holds something else than results of runs in {first_of(bad, ', ')}"
            refuse("--out", str(path), reason, "removing these lines, or another folder")
        self.entries = {self._key(entry["settings"]): entry["result"] for entry in read if entry is not None}

    def __contains__(self, settings: Mapping[str, Any]) -> bool:
        return self._key(settings) in self.entries

    def get(self, settings: Mapping[str, Any]) -> Any:
        """Return what came of ``settings``; None if it is not known."""
        return self.entries.get(self._key(settings))

    def result(self, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """Return what came of ``settings``, computed and written down if it is not known yet.

        Args:
            settings: everything that the result depends on, JSON-able.
            compute: returns a JSON-able result.

        Raises:
            OutputError: the line cannot be written.
        """
        if settings not in self:
            self.add(settings, compute())
        return self.get(settings)

    def add(self, settings: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result down, to the disk itself: a power cut does not lose it.

        Raises:
            OutputError: the line cannot be written.
        """
        entry = json.dumps({"settings": settings, "result": result})
        with self._lock:
            append_line(self.path, entry)
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        self.entries[self._key(settings)] = json.loads(entry)["result"]

    @staticmethod
    def _key(settings: Mapping[str, Any]) -> str:
        return json.dumps(settings, sort_keys=True)


def _entry(line: str) -> dict[str, Any] | None:
    """Return settings and result of a line; None where it holds none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    parts = [entry.get(key) for key in ("settings", "result")] if isinstance(entry, dict) else [None]
    return entry if all(isinstance(part, dict) for part in parts) else None
