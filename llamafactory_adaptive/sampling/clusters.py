"""Kinds of training data: clusters of samples by the direction of their gradients, and a floor under their shares.

Shapes: N samples, C clusters, m samples of a subset, D dimensions of the projected gradients.
"""

import torch
from torch import Tensor

from llamafactory_adaptive.seeding import seeded_index


_FITTED = 20_000  # rows that centroids are fitted to; all rows are then assigned to them
_STARTS, _MOST_ROUNDS = 4, 50


def cluster_directions(x_ND: Tensor, clusters: int, seed: int) -> Tensor:
    """Group rows by direction: k-means of unit vectors, after the mean of all rows is taken off.

    What all samples' gradients have in common would otherwise hide in what they differ.

    Args:
        x_ND: a gradient per sample, projected.
        clusters: number of clusters; fewer where there are fewer different rows.
        seed: seed of the starts, of which the best counts.

    Returns:
        Cluster of every row, (N,) int64, the largest cluster first.
    """
    units_ND = _unit_rows(x_ND.double() - x_ND.double().mean(0))
    generator = torch.Generator().manual_seed(seeded_index(seed, 0, 0, 2**62))
    fitted_nD = units_ND
    if len(units_ND) > _FITTED:
        fitted_nD = units_ND[torch.randperm(len(units_ND), generator=generator)[:_FITTED]]
    fits = [_fit(fitted_nD, _first_centroids(fitted_nD, clusters, generator)) for _ in range(_STARTS)]
    centroids_CD = min(fits, key=lambda fit: fit[1])[0]
    label_N = _nearest(units_ND, centroids_CD)[0]
    _, label_N, count_C = torch.unique(label_N, return_inverse=True, return_counts=True)
    place_C = torch.empty_like(count_C)
    place_C[count_C.argsort(descending=True, stable=True)] = torch.arange(len(count_C))
    return place_C[label_N]


def _unit_rows(x_nD: Tensor) -> Tensor:
    """Divide rows by their lengths; rows of zeros, and those that differ from zero by rounding alone, become 0."""
    norm_n1 = x_nD.norm(dim=1, keepdim=True)
    return torch.where(norm_n1 > 1e-9 * norm_n1.max(), x_nD / norm_n1.clamp(min=1e-300), 0.0)


def _first_centroids(x_nD: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Choose rows to start from, each in proportion to its squared distance from those before (k-means++)."""
    chosen = [int(torch.randint(len(x_nD), (1,), generator=generator))]
    while len(chosen) < clusters:
        distance_n = _nearest(x_nD, x_nD[chosen])[1]
        if float(distance_n.max()) <= 1e-18:  # no further row differs
            break
        bounds_n = distance_n.cumsum(0)
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * bounds_n[-1]
        chosen.append(min(int(torch.searchsorted(bounds_n, drawn, right=True)), len(x_nD) - 1))
    return x_nD[chosen].clone()


def _fit(x_nD: Tensor, centroids_CD: Tensor) -> tuple[Tensor, float]:
    """Move centroids to the means of their rows until no row changes its cluster; return them and the error."""
    label_n, distance_n = _nearest(x_nD, centroids_CD)
    for _ in range(_MOST_ROUNDS):
        count_C = torch.bincount(label_n, minlength=len(centroids_CD))
        sums_CD = torch.zeros_like(centroids_CD).index_add_(0, label_n, x_nD)
        centroids_CD = torch.where(count_C[:, None] > 0, sums_CD / count_C.clamp(min=1)[:, None], centroids_CD)
        before, (label_n, distance_n) = label_n, _nearest(x_nD, centroids_CD)
        if torch.equal(before, label_n):
            break
    return centroids_CD, float(distance_n.sum())


def _nearest(x_nD: Tensor, centroids_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centroid of every row, and the squared distance to it."""
    squares_nC = x_nD.square().sum(1, keepdim=True) + centroids_CD.square().sum(1) - 2.0 * x_nD @ centroids_CD.mT
    distance_n, label_n = squares_nC.min(1)
    return label_n, distance_n.clamp(min=0.0)


class ClusterGuard:
    """Floors under the shares of clusters: each keeps a part of its share of the pool.

    Args:
        cluster_N: cluster of each sample, from 0 on.
        kept_N: False for samples that are never drawn, which count nowhere.
        least: part of a cluster's share of the pool that it keeps, 0 to 1.
    """

    def __init__(self, cluster_N: Tensor, kept_N: Tensor, least: float) -> None:
        self.cluster_N, self.least = cluster_N, least
        kept_C = torch.bincount(cluster_N[kept_N], minlength=int(cluster_N.max()) + 1)
        self.pool_share_C = kept_C.double() / kept_C.sum()

    @property
    def active(self) -> bool:
        """Tell whether any cluster has a floor."""
        return self.least > 0.0

    def floors(self, size: int) -> Tensor:
        """Return the fewest samples of each cluster in a subset of ``size``, rounded down, (C,)."""
        return (self.least * size * self.pool_share_C + 1e-9).floor().long()

    def choose(self, keys_N: Tensor, size: int) -> Tensor:
        """Choose ``size`` samples: first each cluster's largest keys up to its floor, then the largest of the rest."""
        order_N = keys_N.argsort(descending=True, stable=True)
        cluster_of_order_N = self.cluster_N[order_N]
        sure_N = torch.zeros(len(keys_N), dtype=torch.bool)
        for cluster, floor in enumerate(self.floors(size).tolist()):
            sure_N[(cluster_of_order_N == cluster).nonzero().flatten()[:floor]] = True
        sure_N[(~sure_N).nonzero().flatten()[: size - int(sure_N.sum())]] = True
        return order_N[sure_N]

    def sums(self, values_m: Tensor, subset: Tensor) -> Tensor:
        """Add up the values of a subset's samples by cluster, (C,)."""
        return torch.zeros_like(self.pool_share_C).index_add_(0, self.cluster_N[subset], values_m)

    def draw_shares(self, log_weights_m: Tensor, subset: Tensor) -> Tensor:
        """Divide draws among a subset's samples by weight, with clusters below their floors raised to them, (m,).

        Within a cluster shares stay in proportion to weights. A cluster without a sample in the subset has no floor.
        """
        cluster_m, within_m = self.cluster_N[subset], torch.zeros_like(log_weights_m)
        present_C = torch.bincount(cluster_m, minlength=len(self.pool_share_C)) > 0
        for cluster in present_C.nonzero().flatten().tolist():
            within_m[cluster_m == cluster] = torch.softmax(log_weights_m[cluster_m == cluster], 0)
        floor_C = torch.where(present_C, self.least * self.pool_share_C, 0.0)
        share_C = raise_to_floors(self.sums(torch.softmax(log_weights_m, 0), subset), floor_C)
        return share_C[cluster_m] * within_m


def raise_to_floors(share_C: Tensor, floor_C: Tensor) -> Tensor:
    """Raise shares below their floors to them, and scale the others down, so that the sum stays 1.

    Args:
        share_C: shares that sum to 1.
        floor_C: floors that sum to 1 at most.
    """
    low_C = torch.zeros_like(share_C, dtype=torch.bool)
    raised_C = share_C
    while bool((more_C := (raised_C < floor_C - 1e-15) & ~low_C).any()):
        low_C |= more_C
        rest = (1.0 - floor_C[low_C].sum()) / share_C[~low_C].sum().clamp(min=1e-300)
        raised_C = torch.where(low_C, floor_C, share_C * rest)
    return raised_C
