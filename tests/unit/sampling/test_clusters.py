"""Clusters of samples against planted kinds and NumPy; the floor under their shares against exact probabilities."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_adaptive.sampling.clusters import ClusterGuard, cluster_directions, raise_to_floors
from llamafactory_adaptive.sampling.pool import Pool
from tests.helpers.sampling import sampling


def planted(counts, dimensions=16, noise=0.1, seed=0):
    """Rows along a direction per kind, of any length, with what all have in common; and each row's kind."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    directions = torch.linalg.qr(torch.randn(dimensions, len(counts), generator=generator)).Q.mT
    rows = directions[kinds] + noise * torch.randn(len(kinds), dimensions, generator=generator)
    return rows + 3.0, kinds


def same_partition(first, second):
    return len(set(zip(first.tolist(), second.tolist(), strict=True))) == len(first.unique()) == len(second.unique())


def test_planted_kinds_are_found_the_largest_first():
    x, kinds = planted((20, 50, 30))
    found = cluster_directions(x, 3, seed=0)
    assert same_partition(found, kinds)
    assert torch.bincount(found).tolist() == [50, 30, 20]
    assert torch.equal(cluster_directions(7.0 * x, 3, seed=0), found), "the scale of gradients does not matter"
    assert torch.equal(cluster_directions(x, 3, seed=0), found)


def test_every_row_is_nearest_to_the_mean_of_its_own_cluster():
    """What k-means promises, in NumPy, on rows that have no kinds."""
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    found = cluster_directions(x, 5, seed=0).numpy()
    centred = x.double().numpy() - x.double().numpy().mean(0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    means = np.stack([units[found == cluster].mean(0) for cluster in range(5)])
    assert (((units[:, None] - means) ** 2).sum(2).argmin(1) == found).all()


def test_fewer_different_rows_than_clusters_make_fewer_clusters():
    two = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert cluster_directions(two, 8, seed=0).tolist() == [0, 0, 1]
    assert cluster_directions(torch.ones(4, 3), 8, seed=0).tolist() == [0, 0, 0, 0]


# -- the floor -------------------------------------------------------------------------------------------------------

QUALITY = torch.tensor([3.0, 2.5, 2.0, -1.0, -1.5, -2.0], dtype=torch.float64)
CLUSTER = torch.tensor([0, 0, 0, 1, 1, 1])


def guarded(least, ratio=0.5, **more):
    settings = sampling(min_cluster_share=least, subset_ratio=ratio, **more)
    return Pool(QUALITY, QUALITY, settings, 0, CLUSTER)


def exact_inclusion(p, size, floors):
    """Sum over all orders in which samples can come by p, without replacement, of what the floor makes of each."""
    found = np.zeros(len(p))
    for order in itertools.permutations(range(len(p))):
        rest, chance = 1.0, 1.0
        for index in order:
            chance *= p[index] / rest
            rest -= p[index]
        mine = [[i for i in order if CLUSTER[i] == c][:floor] for c, floor in enumerate(floors)]
        sure = [i for chosen in mine for i in chosen]
        found[sure + [i for i in order if i not in sure][: size - len(sure)]] += chance
    return found


@pytest.mark.parametrize("least", [0.0, 0.7, 1.0])
def test_inclusion_follows_the_weights_above_the_floor(least):
    """4,000 draws of 3 of 6 samples against the sum over all 720 orders; at 0 nothing differs from a plain draw."""
    pool, draws = guarded(least), 4000
    floors = [int(least * 3 * 0.5)] * 2
    expected = exact_inclusion(pool.probabilities.numpy(), 3, floors)
    subsets = torch.stack([pool._subset(refresh) for refresh in range(draws)])
    found = torch.bincount(subsets.flatten(), minlength=6).numpy() / draws
    assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / draws) + 1e-9).all()
    plain = Pool(QUALITY, QUALITY, sampling(subset_ratio=0.5), 0)
    assert all(torch.equal(guarded(0.0).subset(k), plain.subset(k)) for k in range(20))


@given(
    clusters=st.lists(st.integers(0, 3), min_size=2, max_size=40),
    least=st.floats(0.01, 1.0),
    ratio=st.floats(0.05, 1.0),
    by_quality=st.booleans(),
)
def test_every_cluster_keeps_its_floor_however_low_its_quality(clusters, least, ratio, by_quality):
    cluster_N = torch.tensor(clusters)
    settings = sampling(min_cluster_share=least, subset_ratio=ratio, draws_by_quality=by_quality, temperature=0.01)
    pool = Pool(-1.0 * cluster_N.double(), cluster_N.double(), settings, 1, cluster_N)
    subset, held = pool.subset(3), torch.bincount(cluster_N).double() / len(clusters)
    count = torch.bincount(cluster_N[subset], minlength=len(held))
    assert len(subset) == len(set(subset.tolist())) == pool.subset_size
    assert (count + 1 > least * pool.subset_size * held - 1e-6).all(), "rounded down to whole samples"
    pool_shares, draw_shares = pool.cluster_shares(3)
    assert torch.allclose(pool_shares, held)
    assert float(draw_shares.sum()) == pytest.approx(1.0)
    if by_quality:
        assert (draw_shares >= least * held - 1e-12)[count > 0].all()
    else:
        assert torch.allclose(draw_shares, count.double() / pool.subset_size)


def test_clipped_samples_count_in_no_cluster():
    guard = ClusterGuard(CLUSTER, torch.tensor([True, True, True, True, False, False]), 1.0)
    assert guard.pool_share_C.tolist() == [0.75, 0.25]
    assert guard.floors(4).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("shares", "floors", "expected"),
    [
        ([0.9, 0.1], [0.25, 0.25], [0.75, 0.25]),
        ([0.5, 0.3, 0.2], [0.1, 0.1, 0.1], [0.5, 0.3, 0.2]),
        # 0.01 is raised to 0.4; what is left of the second, 0.2 * 0.6 / 0.99, is then below its floor, too
        ([0.79, 0.2, 0.01], [0.4, 0.2, 0.4], [0.4, 0.2, 0.4]),
        ([1.0, 0.0], [0.5, 0.5], [0.5, 0.5]),
    ],
)
def test_shares_are_raised_to_floors_and_the_others_scaled(shares, floors, expected):
    found = raise_to_floors(torch.tensor(shares).double(), torch.tensor(floors).double())
    assert found.tolist() == pytest.approx(expected)


def test_within_a_cluster_draws_stay_in_proportion_to_weights():
    pool = guarded(0.8, ratio=1.0, draws_by_quality=True)
    shares, p = pool.draw_shares(0), pool.probabilities
    assert shares[3:].sum() == pytest.approx(0.8 * 0.5)
    for mine in (slice(0, 3), slice(3, 6)):
        assert torch.allclose(shares[mine] / shares[mine].sum(), p[mine] / p[mine].sum())
