"""Weights of training samples from their quality, and the subsets that are drawn by them.

All results are pure functions of qualities, seed and step: they are equal on every process and exact after a resume in
the middle of an epoch. No file, process group or Trainer is used.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from llamafactory_adaptive.methods import Sampling
from llamafactory_adaptive.sampling.clusters import ClusterGuard
from llamafactory_adaptive.sampling.quality import SampleTerms
from llamafactory_adaptive.seeding import seeded_index


def quality_of(terms: SampleTerms, sampling: Sampling) -> Tensor:
    """Compute the quality of every sample from its measured terms, (N,) fp64."""
    norm_N = terms.gradient_norm.square() if sampling.squared_norm else terms.gradient_norm
    return combine_terms((norm_N, terms.loss_drop, terms.alignment), sampling.weights)


def combine_terms(terms: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Compute weighted sums of z-scores over the pool (TsqLoRA: ``Q_i = a1 |g_i| + a2 dl_i + a3 dC_i``); (N,) fp64.

    A term that is the same for every sample is left out.
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
        quality_N: quality per sample; samples of higher quality are drawn more often.
        tail_N: values by which samples are clipped, the largest first.
        sampling: temperature, sizes of pool and subsets, how batches are drawn, and the guard of clusters.
        seed: seed of the draws.
        cluster_N: cluster of each sample, from 0 on; None if clusters are not known.
    """

    def __init__(
        self, quality_N: Tensor, tail_N: Tensor, sampling: Sampling, seed: int, cluster_N: Tensor | None = None
    ) -> None:
        self.quality_N, self.seed = quality_N, seed
        samples = len(quality_N)
        self.subset_size = sampling.subset_size(samples)
        self.kept_N = torch.ones(samples, dtype=torch.bool)
        clipped = samples - sampling.pool_size(samples)
        if clipped:  # a stable sort: of equal values the later samples are clipped
            self.kept_N[tail_N.sort(stable=True).indices[-clipped:]] = False
        self.temperature, self.draws_by_quality = sampling.temperature, sampling.draws_by_quality
        self.log_weights_N = torch.where(self.kept_N, quality_N / sampling.temperature, -torch.inf)
        self.guard = None if cluster_N is None else ClusterGuard(cluster_N, self.kept_N, sampling.min_cluster_share)
        self.subset = lru_cache(maxsize=4)(self._subset)
        self.order = lru_cache(maxsize=4)(self._order)
        self.draw_shares = lru_cache(maxsize=4)(self._draw_shares)

    @property
    def probabilities(self) -> Tensor:
        """Compute the softmax of quality over temperature; clipped samples get 0."""
        return torch.softmax(self.log_weights_N, 0)

    @property
    def effective_size(self) -> float:
        """Compute the effective sample size: the number of equally likely samples that the weights amount to."""
        return _effective_size(self.log_weights_N)

    def temperature_for(self, effective_size: float) -> float:
        """Return the temperature, doubled until the weights have at least this effective sample size."""
        factor = 1.0
        while factor < 2.0**40 and _effective_size(self.log_weights_N / factor) < effective_size:
            factor *= 2.0
        return self.temperature * factor

    def _subset(self, refresh: int) -> Tensor:
        """Draw sample numbers without replacement: the largest ``log p + Gumbel noise`` (Kool et al., 1903.06059).

        With a guard every cluster's floor is filled by its own largest, the rest of the subset by the largest of all
        others: within a cluster samples come in the same order as without it.
        """
        uniform_N = torch.rand(len(self.quality_N), generator=self._generator(refresh, 0), dtype=torch.float64)
        gumbel_N = -(-uniform_N.clamp(min=1e-300).log()).log()
        keys_N = self.log_weights_N + gumbel_N
        if self.guard is None or not self.guard.active:
            return keys_N.topk(self.subset_size).indices.sort().values
        return self.guard.choose(keys_N, self.subset_size).sort().values

    def _generator(self, refresh: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(seeded_index(self.seed, refresh, use, 2**62))

    def _draw_shares(self, refresh: int) -> Tensor:
        """Compute the share of the draws from a subset that each of its samples gets on average, in its order."""
        subset = self.subset(refresh)
        if not self.draws_by_quality:
            return torch.full((len(subset),), 1.0 / len(subset), dtype=torch.float64)
        log_weights_m = self.log_weights_N[subset]
        if self.guard is None or not self.guard.active:
            return torch.softmax(log_weights_m, 0)
        return self.guard.draw_shares(log_weights_m, subset)

    def _order(self, refresh: int, turn: int) -> Tensor:
        """Draw one turn through a subset, anew for every turn.

        It is the subset, shuffled; or, by quality, as many independent draws from it with replacement.
        """
        subset, generator = self.subset(refresh), self._generator(refresh, 1 + turn)
        if not self.draws_by_quality:
            return subset[torch.randperm(self.subset_size, generator=generator)]
        bounds_m = self.draw_shares(refresh).cumsum(0)
        uniform_m = torch.rand(self.subset_size, generator=generator, dtype=torch.float64) * bounds_m[-1]
        places_m = torch.searchsorted(bounds_m, uniform_m, right=True)  # right: a share of 0 is never hit
        return subset[places_m.clamp(max=self.subset_size - 1)]

    def stretch(self, refresh: int, start: int, count: int) -> list[int]:
        """Return ``count`` sample numbers of one subset from place ``start`` on, turn after turn through it."""
        samples: list[int] = []
        while len(samples) < count:
            turn, place = divmod(start + len(samples), self.subset_size)
            samples += self.order(refresh, turn)[place : place + count - len(samples)].tolist()
        return samples

    def mean_percentile(self, refresh: int) -> float:
        """Compute the mean place of a subset's samples in the pool's quality order, from 0 (worst) to 1 (best)."""
        kept = self.kept_N.nonzero().flatten()
        if len(kept) < 2:
            return 1.0
        place_N = torch.zeros(len(self.quality_N), dtype=torch.float64)
        order = self.quality_N[kept].sort(stable=True).indices
        place_N[kept[order]] = torch.linspace(0.0, 1.0, len(kept), dtype=torch.float64)
        return float(place_N[self.subset(refresh)].mean())

    def cluster_shares(self, refresh: int) -> tuple[Tensor, Tensor] | None:
        """Return each cluster's share of the pool, and of the draws from a subset; None without clusters."""
        if self.guard is None:
            return None
        return self.guard.pool_share_C, self.guard.sums(self.draw_shares(refresh), self.subset(refresh))


def _effective_size(log_weights_N: Tensor) -> float:
    """Compute Kish's effective sample size, ``1 / sum p^2``."""
    return float(1.0 / torch.softmax(log_weights_N, 0).square().sum())
