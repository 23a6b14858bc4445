"""Order of the training samples, as a pure function of seed and step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llamafactory_adaptive.sampling.pool import Pool


@dataclass(frozen=True)
class Timeline:
    """Arithmetic of optimizer steps, epochs and subsets.

    Attributes:
        epoch_samples: samples per epoch, of all processes together.
        samples_per_step: samples per optimizer step, of all processes and micro-batches.
        interval: optimizer steps from one refresh of the subset to the next.
        last_refresh: number of the last refresh; the first subset is number 0.
    """

    epoch_samples: int
    samples_per_step: int
    interval: int
    last_refresh: int

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimizer steps of an epoch; the last one may have fewer samples."""
        return -(-self.epoch_samples // self.samples_per_step)

    def refresh(self, step: int) -> int:
        """Return the number of the subset from which the optimizer step after ``step`` others draws."""
        return min(step // self.interval, self.last_refresh)

    def seen(self, step: int) -> int:
        """Count the samples drawn in the first ``step`` optimizer steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self.epoch_samples + min(within * self.samples_per_step, self.epoch_samples)


class SampleOrder:
    """The samples of every optimizer step, which follow from its number and the qualities alone.

    Args:
        pool: the scored samples, from which subsets are drawn.
        timeline: arithmetic of steps, epochs and subsets.
        rescored: whether samples are scored again for every refresh; the pool is then that of the first subset, and
            :meth:`add` takes those of the others, one after another.
    """

    def __init__(self, pool: Pool, timeline: Timeline, rescored: bool = False) -> None:
        self.pools, self.timeline, self.rescored = [pool], timeline, rescored

    def add(self, pool: Pool) -> None:
        """Add the pool of the next refresh."""
        self.pools.append(pool)

    def pool(self, refresh: int) -> Pool:
        """Return the pool from which a refresh draws its subset.

        Raises:
            RuntimeError: its samples are not scored yet.
        """
        if not self.rescored:
            return self.pools[0]
        if refresh >= len(self.pools):
            raise RuntimeError(f"samples of refresh {refresh} are drawn before they are scored again")
        return self.pools[refresh]

    def missing(self, step: int, lead: int) -> bool:
        """Tell whether samples must be scored again after ``step`` steps, ``lead`` steps before they are drawn."""
        needed = min((step + lead) // self.timeline.interval, self.timeline.last_refresh)
        return self.rescored and len(self.pools) <= needed

    def samples_of(self, step: int) -> list[int]:
        """Return the sample numbers of one optimizer step."""
        refresh, start = self.timeline.refresh(step), self.timeline.seen(step)
        begin = self.timeline.seen(refresh * self.timeline.interval)
        return self.pool(refresh).stretch(refresh, start - begin, self.timeline.seen(step + 1) - start)

    def usage(self, steps: int) -> Tensor:
        """Count how often each sample was drawn in the first ``steps`` optimizer steps, (N,)."""
        drawn = [index for step in range(steps) for index in self.samples_of(step)]
        return torch.bincount(torch.tensor(drawn, dtype=torch.int64), minlength=len(self.pools[0].quality_N))


def steps_ahead(workers: int, batches_per_worker: int | None, batches_per_step: int) -> int:
    """Count the optimizer steps before a step by whose end its samples must be known, since they may be drawn then.

    While a step trains, the data loader holds one batch after it, and its workers as many as they fetch ahead.

    Args:
        workers: worker processes of the data loader.
        batches_per_worker: batches that each fetches ahead; None for PyTorch's own number, 2.
        batches_per_step: batches of one process in an optimizer step.
    """
    return 1 + workers * (batches_per_worker or 2) // batches_per_step


class SubsetSampler(Sampler[int]):
    """Sampler of one epoch after another; the subset changes by optimizer step, in the middle of an epoch too.

    The samples of a step follow from its number alone, so that prefetching workers and resumed runs agree.
    A Trainer takes its sampler before samples are scored: until :meth:`set_order` the sampler has a length only.

    Args:
        epoch_samples: length of an epoch: the size of a subset, rounded up to whole batches of all processes;
            a last batch that is not whole would be filled up with samples that are not counted.
    """

    def __init__(self, epoch_samples: int) -> None:
        self.epoch_samples = epoch_samples
        self.epoch = 0
        self._order: SampleOrder | None = None

    def set_order(self, order: SampleOrder) -> None:
        """Set the order that follows from the scores, before the first epoch begins."""
        self._order = order

    @property
    def order(self) -> SampleOrder:
        """Return the order of the samples.

        Raises:
            RuntimeError: the samples are not scored yet.
        """
        if self._order is None:
            raise RuntimeError("the order of the samples is not set yet: it follows from their scores")
        return self._order

    def begin_epoch(self, step: int) -> None:
        """Set the epoch that begins, or goes on after a resume, once ``step`` optimizer steps are done.

        This is not ``set_epoch``, which accelerate 1.11 does not pass on to the sampler after a resume of several
        processes.
        """
        self.epoch = step // self.order.timeline.steps_per_epoch

    def __len__(self) -> int:
        return self.epoch_samples

    def __iter__(self) -> Iterator[int]:
        steps = self.order.timeline.steps_per_epoch
        for step in range(self.epoch * steps, (self.epoch + 1) * steps):
            yield from self.order.samples_of(step)
