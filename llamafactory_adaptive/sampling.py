"""From the quality of samples to the order in which training sees them: weights, subsets, the sampler.

Pure functions of qualities, seed and step: equal on every process, exact after a resume in the middle of an epoch. No
file, no process group, no Trainer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llamafactory_adaptive.methods import Sampling
from llamafactory_adaptive.seeding import draw


def combine_terms(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum of z-scores over the pool (TsqLoRA: ``Q_i = a1 |g_i| + a2 dl_i + a3 dC_i``); (N,) fp64.

    A term that is the same for every sample says nothing.
    """
    total_N = torch.zeros_like(terms[0])
    for term_N, weight in zip(terms, weights, strict=True):
        deviation = term_N.std(correction=0)
        if weight and deviation > 1e-12 * term_N.abs().max():
            total_N += weight * (term_N - term_N.mean()) / deviation
    return total_N


class Pool:
    """A training set with a quality per sample, and the subsets drawn from it.

    Args:
        quality_N: higher is drawn more often.
        tail_N: what ``clip_quantile`` looks at.
        sampling: temperature, sizes.
        seed: of the draws.
    """

    def __init__(self, quality_N: Tensor, tail_N: Tensor, sampling: Sampling, seed: int) -> None:
        self.quality_N, self.seed = quality_N, seed
        samples = len(quality_N)
        self.subset_size = sampling.subset_size(samples)
        self.kept_N = torch.ones(samples, dtype=torch.bool)
        clipped = samples - sampling.pool_size(samples)
        if clipped:  # a stable sort: of equal values the later samples go
            self.kept_N[tail_N.sort(stable=True).indices[-clipped:]] = False
        self.temperature = sampling.temperature
        self.log_weights_N = torch.where(self.kept_N, quality_N / sampling.temperature, -torch.inf)
        self.subset = lru_cache(maxsize=4)(self._subset)
        self.order = lru_cache(maxsize=4)(self._order)

    @property
    def probabilities(self) -> Tensor:
        """Softmax of quality over temperature; 0 for what was clipped."""
        return torch.softmax(self.log_weights_N, 0)

    @property
    def effective_size(self) -> float:
        """How many equally likely samples the weights amount to."""
        return _effective_size(self.log_weights_N)

    def temperature_for(self, effective_size: float) -> float:
        """A temperature, doubled as often as it takes, whose weights amount to that many equally likely samples."""
        factor = 1.0
        while factor < 2.0**40 and _effective_size(self.log_weights_N / factor) < effective_size:
            factor *= 2.0
        return self.temperature * factor

    def _subset(self, refresh: int) -> Tensor:
        """Sample numbers drawn without replacement: the largest ``log p + Gumbel noise`` (Kool et al., 1903.06059)."""
        generator = torch.Generator().manual_seed(draw(self.seed, refresh, 0, 2**62))
        uniform_N = torch.rand(len(self.quality_N), generator=generator, dtype=torch.float64)
        gumbel_N = -(-uniform_N.clamp(min=1e-300).log()).log()
        return (self.log_weights_N + gumbel_N).topk(self.subset_size).indices.sort().values

    def _order(self, refresh: int, turn: int) -> Tensor:
        """The subset shuffled, anew for every turn through it."""
        generator = torch.Generator().manual_seed(draw(self.seed, refresh, 1 + turn, 2**62))
        return self.subset(refresh)[torch.randperm(self.subset_size, generator=generator)]

    def stretch(self, refresh: int, start: int, count: int) -> list[int]:
        """``count`` sample numbers of one subset from place ``start`` on, turn after turn."""
        found: list[int] = []
        while len(found) < count:
            turn, place = divmod(start + len(found), self.subset_size)
            found += self.order(refresh, turn)[place : place + count - len(found)].tolist()
        return found

    def mean_percentile(self, refresh: int) -> float:
        """Mean place of a subset's samples in the quality order of the pool, from 0 (worst) to 1 (best)."""
        kept = self.kept_N.nonzero().flatten()
        if len(kept) < 2:
            return 1.0
        place_N = torch.zeros(len(self.quality_N), dtype=torch.float64)
        order = self.quality_N[kept].sort(stable=True).indices
        place_N[kept[order]] = torch.linspace(0.0, 1.0, len(kept), dtype=torch.float64)
        return float(place_N[self.subset(refresh)].mean())


def _effective_size(log_weights_N: Tensor) -> float:
    """``1 / sum p^2`` (Kish)."""
    return float(1.0 / torch.softmax(log_weights_N, 0).square().sum())


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
