"""How many extra passes a limit on their cost allows."""

import time
from collections.abc import Mapping

import torch

from llamafactory_adaptive.engines.distributed import all_reduce_max


class ProbeBudget:
    """Spaces probes out so that they stay within a share of the training time. All processes agree on each date.

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
        """Whether a probe at this step would fit."""
        return step >= self.next_step

    def begin(self) -> None:
        """An optimizer step begins."""
        self._since = time.perf_counter()

    def trained(self) -> None:
        """Its own passes are over."""
        if self._since is not None:
            self.training += time.perf_counter() - self._since
            self.steps += 1

    def probed(self, step: int, seconds: float, device: torch.device) -> None:
        """A probe took ``seconds``: set the date of the next one."""
        self.probing += seconds
        self.probes += 1
        if self.limit is None:
            return
        missing = (self.probing + self.probing / self.probes) / self.limit - self.training
        wait = missing / max(self.training / max(self.steps, 1), 1e-9)
        self.next_step = all_reduce_max(step + max(1, int(wait) + 1), device)

    def state(self) -> dict[str, float]:
        """Give what a checkpoint keeps of it."""
        return {key: getattr(self, key) for key in ("probing", "training", "probes", "steps", "next_step")}

    def load(self, state: Mapping[str, float]) -> None:
        """Take back what :meth:`state` gave."""
        for key, value in state.items():
            setattr(self, key, value)
