"""What a run says of itself: counters, seconds, warnings, and the lines of its log file."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.files import LOG_FILE, append_line


logger = logging.getLogger("llamafactory.adaptive")  # a child of the host's logger: its format, its handlers


@dataclass
class Counters:
    """What really happened, quoted by the guard when something did not."""

    configs_injected: int = 0
    modules_checked: int = 0
    steps: int = 0
    gradients_missing: int = 0
    observations: int = 0
    probes: int = 0
    allocations: int = 0
    largest_learning_rate: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items())


class RunLog:
    """Keeps count of a run, and writes it down line by line.

    Args:
        method: named in every line.
        overhead_seconds: what planning cost.
    """

    def __init__(self, method: str, overhead_seconds: float) -> None:
        self.method, self.overhead_seconds = method, overhead_seconds
        self.counters = Counters()
        self.warnings: list[str] = []
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the log was begun."""
        return time.perf_counter() - self._started

    def warn(self, text: str) -> None:
        """Tell the user now, and once more at the end of the run."""
        logger.warning(text)
        self.warnings.append(text)

    def write(self, output: Path, line: Mapping[str, Any]) -> None:
        """Append one line to the log file in ``output``, with what every line has."""
        facts = {
            "method": self.method,
            "counters": asdict(self.counters),
            "overhead_seconds": round(self.overhead_seconds, 3),
            "time": time.time(),
        }
        append_line(output / LOG_FILE, json.dumps({**line, **facts}))
