"""The ledger of a comparison: what came of each finished run, by the settings it came from."""

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.files import append_line, read_lines


class Ledger:
    """Results by the settings they came from, one JSON line each; what stands there is not computed again.

    A line that a kill cut short is dropped. Threads may share one.

    Args:
        path: file of the lines; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        entries = map(json.loads, read_lines(path)) if path.exists() else ()
        self.entries = {self._key(entry["settings"]): entry["result"] for entry in entries}

    def __contains__(self, settings: Mapping[str, Any]) -> bool:
        return self._key(settings) in self.entries

    def get(self, settings: Mapping[str, Any]) -> Any:
        """Return what came of ``settings``; None if it is not known."""
        return self.entries.get(self._key(settings))

    def forget(self, settings: Mapping[str, Any]) -> None:
        """Compute ``settings`` anew when they are next asked for; the newer line then counts."""
        self.entries.pop(self._key(settings), None)

    def result(self, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """Return what came of ``settings``, computed and written down if it is not known yet.

        Args:
            settings: everything that the result depends on, JSON-able.
            compute: returns a JSON-able result.

        Raises:
            OutputError: the line cannot be written.
        """
        key = self._key(settings)
        if key not in self.entries:
            entry = json.dumps({"settings": settings, "result": compute()})
            with self._lock:
                append_line(self.path, entry)
            self.entries[key] = json.loads(entry)["result"]
        return self.entries[key]

    @staticmethod
    def _key(settings: Mapping[str, Any]) -> str:
        return json.dumps(settings, sort_keys=True)
