"""Spacing of extra passes under a limit on their cost."""

import time
from collections.abc import Mapping

import torch

from llamafactory_adaptive.engines.distributed import all_reduce_max


_STORED = ("probing", "training", "probes", "steps", "next_step")  # in a checkpoint


class ProbeBudget:
    """Schedule of extra passes within a share of the training time; every process computes the same steps.

    Args:
        limit: seconds of probing per second of training; None for no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.probing = 0.0
        self.training = 0.0
        self.probes = self.steps = self.next_step = 0
        self._since: float | None = None

    def due(self, step: int) -> bool:
        """Tell whether extra passes are allowed at this step."""
        return step >= self.next_step

    def begin(self) -> None:
        """Start the clock of an optimizer step."""
        self._since = time.perf_counter()

    def trained(self) -> None:
        """Add the time of the step's own passes to the training time."""
        if self._since is not None:
            self.training += time.perf_counter() - self._since
            self.steps += 1

    def probed(self, step: int, seconds: float, device: torch.device) -> None:
        """Add the ``seconds`` of a probe, and set the first step of the next one; all processes must call it."""
        self.probing += seconds
        self.probes += 1
        if self.limit is None:
            return
        missing = (self.probing + self.probing / self.probes) / self.limit - self.training
        wait = missing / max(self.training / max(self.steps, 1), 1e-9)
        self.next_step = all_reduce_max(step + max(1, int(wait) + 1), device)

    def state(self) -> dict[str, float]:
        """Return the times and counts that a checkpoint stores."""
        return {key: getattr(self, key) for key in _STORED}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore what :meth:`state` returned."""
        for key in _STORED:
            setattr(self, key, state[key])
