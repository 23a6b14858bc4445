"""Settings by which a method chooses training samples. Without torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Settings by which a method chooses training samples.

    Attributes:
        weights: weights of gradient norm, loss drop and alignment in the quality.
        loss_drop: ``first_order`` or ``exact``.
        step_size: eta of the loss drop; None for the run's learning rate.
        projection: dimensions of the random projection for the alignment; 0 for the exact one.
        temperature: temperature of the softmax over qualities.
        subset_ratio: share of the pool that is trained on between two refreshes.
        clip_term: term that ``clip_quantile`` applies to, ``loss`` or ``gradient_norm``.
        clip_quantile: samples whose term lies above it are left out; 1 keeps all.
        batch_size: samples per scoring batch; None for the run's.
        refresh_ratio: share of all optimizer steps between two draws.
        scales_budget: whether the rank budget depends on the quality of the subset.
        squared_norm: whether the gradient norm enters the quality squared.
        draws_by_quality: whether samples are drawn from a subset by their weights, rather than each once a turn.
        refresh_quality: whether all samples are scored again before every refresh.
        clusters: number of clusters of samples to tell apart; 0 for none.
        min_cluster_share: part of its share of the pool that a cluster keeps in every subset; 0 for no floor.
    """

    weights: tuple[float, float, float]
    loss_drop: str
    step_size: float | None
    projection: int
    temperature: float
    subset_ratio: float
    clip_term: str
    clip_quantile: float
    batch_size: int | None
    refresh_ratio: float
    scales_budget: bool
    squared_norm: bool = False
    draws_by_quality: bool = False
    refresh_quality: bool = False
    clusters: int = 0
    min_cluster_share: float = 0.0

    def pool_size(self, samples: int) -> int:
        """Count the samples that clipping leaves of a training set of ``samples``."""
        return max(1, samples - int((1.0 - self.clip_quantile) * samples + 1e-9))

    def subset_size(self, samples: int) -> int:
        """Count the samples in one subset of a training set of ``samples``."""
        return max(1, round(self.subset_ratio * self.pool_size(samples)))
