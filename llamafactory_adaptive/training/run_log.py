"""Records of a run: counters, seconds, warnings, and the lines of its log file."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llamafactory_adaptive.accelerator import peak_memory
from llamafactory_adaptive.files import LOG_FILE, append_line


logger = logging.getLogger("llamafactory.adaptive")  # a child of the host's logger: its format, its handlers


@dataclass
class Counters:
    """Counts of what happened in a run, which error messages quote."""

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
    """Log of a run: counters, warnings and seconds, written line by line.

    Args:
        method: name of the method, part of every line.
        planning_seconds: seconds that planning took.
        words: rewrites a warning in the notation of its reader; by default it stays as it is.
        origin: where the plan is from, ``PlanSource.origin``; empty where nothing was planned.

    Attributes:
        overhead: seconds of each work that plain LoRA has not: ``planning``, ``scoring_samples``, ``observing``,
            ``allocating``; ``before`` is that of a checkpoint of an earlier version, which told only their sum.
        memory: bytes of such a work in this process, by ``host`` and ``device``: the statistics of ``observing``, the
            peak by the end of ``scoring_samples``, and by how much ``allocating`` raised the peak in all.
        seconds_before: seconds of the run before it was resumed.
    """

    def __init__(
        self, method: str, planning_seconds: float, words: Callable[[str], str] = str, origin: str = ""
    ) -> None:
        self.method, self.words, self.origin = method, words, origin
        self.overhead = {"planning": planning_seconds}
        self.memory: dict[str, dict[str, int]] = {}
        self.seconds_before = 0.0
        self.counters = Counters()
        self.warnings: list[str] = []
        self._started = time.perf_counter()

    @property
    def overhead_seconds(self) -> float:
        """Return the seconds of all work that plain LoRA has not."""
        return sum(self.overhead.values())

    def spend(self, work: str, seconds: float) -> None:
        """Add the seconds of a work that plain LoRA has not."""
        self.overhead[work] = self.overhead.get(work, 0.0) + seconds

    def hold(self, work: str, sizes: Mapping[str, int]) -> None:
        """Keep the bytes of a work, by ``host`` and ``device``, if they are more than before."""
        most = self.memory.setdefault(work, {})
        most.update({kind: size for kind, size in sizes.items() if size >= most.get(kind, 0)})

    @property
    def seconds(self) -> float:
        """Return the seconds since the log was created, and those before a resume."""
        return self.seconds_before + time.perf_counter() - self._started

    def begin_again(self) -> None:
        """Set all counters back, of a run that begins anew."""
        for counter in fields(self.counters):
            setattr(self.counters, counter.name, counter.default)

    def warn(self, text: str) -> None:
        """Write a warning to the log, and keep it for the report at the end of the run."""
        said = self.words(text)
        logger.warning(said)
        if said not in self.warnings:  # a run that begins anew says it again
            self.warnings.append(said)

    def write(self, output: Path, line: Mapping[str, Any]) -> None:
        """Append a line to the log file in ``output``, with method, counters, costs and time added."""
        facts = {
            "method": self.method,
            "counters": asdict(self.counters),
            "overhead_seconds": round(self.overhead_seconds, 3),
            "overhead": {work: round(seconds, 3) for work, seconds in self.overhead.items()},
            **({"plan_origin": self.origin} if self.origin else {}),
            "peak_memory": peak_memory(),
            "memory": self.memory,
            "time": time.time(),
        }
        append_line(output / LOG_FILE, json.dumps({**line, **facts}))
