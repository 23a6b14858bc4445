"""Which samples are drawn when: a pure function of seed and step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llamafactory_adaptive.sampling.pool import Pool


@dataclass(frozen=True)
class Timeline:
    """Which samples and which subset an optimizer step belongs to.

    Attributes:
        epoch_samples: per epoch, all processes together.
        samples_per_step: of all processes and micro-batches.
        interval: optimizer steps from one refresh to the next.
        last_refresh: number of the last one; the first subset is number 0.
    """

    epoch_samples: int
    samples_per_step: int
    interval: int
    last_refresh: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may be smaller."""
        return -(-self.epoch_samples // self.samples_per_step)

    def refresh(self, step: int) -> int:
        """Number of the subset that the step after ``step`` others draws from."""
        return min(step // self.interval, self.last_refresh)

    def seen(self, step: int) -> int:
        """Samples drawn in the first ``step`` steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.epoch_samples + min(within * self.samples_per_step, self.epoch_samples)


class SubsetSampler(Sampler[int]):
    """The order of samples, epoch by epoch; the subset changes with the optimizer step, in the middle of an epoch too.

    What a step sees follows from its number alone, so that prefetching workers and resumed runs agree.

    Args:
        epoch_samples: length of an epoch: the size of a subset, rounded up to whole batches of all processes, which
            would otherwise be filled up with samples that nobody counts.
    """

    def __init__(self, epoch_samples: int) -> None:
        self.epoch_samples = epoch_samples
        self.epoch = 0
        self.pool: Pool
        self.timeline: Timeline

    def begin_epoch(self, step: int) -> None:
        """An epoch begins, or goes on after a resume, with ``step`` optimizer steps done.

        Not ``set_epoch``: after a resume accelerate 1.11 does not reach the sampler of several processes with it.
        """
        self.epoch = step // self.timeline.steps_per_epoch

    def __len__(self) -> int:
        return self.epoch_samples

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.timeline.steps_per_epoch
        for step in range(first, first + self.timeline.steps_per_epoch):
            yield from self.samples_of(step)

    def samples_of(self, step: int) -> list[int]:
        """Sample numbers of one optimizer step."""
        refresh, start = self.timeline.refresh(step), self.timeline.seen(step)
        begin = self.timeline.seen(refresh * self.timeline.interval)
        return self.pool.stretch(refresh, start - begin, self.timeline.seen(step + 1) - start)

    def usage(self, steps: int) -> Tensor:
        """How often each sample was drawn in the first ``steps`` steps, (N,)."""
        drawn = [index for step in range(steps) for index in self.samples_of(step)]
        return torch.bincount(torch.tensor(drawn, dtype=torch.int64), minlength=len(self.pool.quality_N))
