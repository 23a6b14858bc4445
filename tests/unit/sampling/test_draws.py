"""Weights, subsets and the order of samples: distributions against theory, positions against a plain enumeration."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_adaptive.sampling.pool import Pool, combine_terms, quality_of
from llamafactory_adaptive.sampling.quality import SampleTerms
from llamafactory_adaptive.sampling.sampler import SampleOrder, SubsetSampler, Timeline, steps_ahead
from tests.helpers.sampling import sampling


def pool(quality, norms=None, seed=0, **more):
    quality = torch.tensor(quality, dtype=torch.float64)
    norms = quality if norms is None else torch.tensor(norms, dtype=torch.float64)
    return Pool(quality, norms, sampling(**more), seed)


def test_quality_is_a_weighted_sum_of_z_scores():
    first, second = torch.tensor([1.0, 2.0, 6.0]).double(), torch.tensor([5.0, 5.0, 5.0]).double()
    quality = combine_terms((first, second, first), (2.0, 1.0, -0.5))
    z = (first - 3.0) / math.sqrt((4 + 1 + 9) / 3)
    assert torch.allclose(quality, 1.5 * z)
    assert torch.allclose(combine_terms((first * 1e6,), (1.0,)), z), "scale does not matter"


def test_the_squared_norm_is_the_first_order_loss_drop_over_again():
    """``a1 |g|^2 + a2 eta |g|^2`` in z-scores is ``(a1 + a2) eta |g|^2``, whatever eta is."""
    norm = torch.tensor([0.3, 2.0, 1.1, 0.7], dtype=torch.float64)
    terms = SampleTerms(norm, norm, 1e-4 * norm.square(), 0 * norm, 0 * norm)
    squared = quality_of(terms, sampling(weights=(1.5, 0.5, 0.0), squared_norm=True))
    assert torch.allclose(squared, quality_of(terms, sampling(weights=(0.0, 2.0, 0.0))))
    z = (norm.square() - norm.square().mean()) / norm.square().std(correction=0)
    assert torch.allclose(squared, 2.0 * z)
    assert not torch.allclose(squared, quality_of(terms, sampling(weights=(1.5, 0.5, 0.0))))


def test_the_first_draw_follows_the_softmax():
    """The largest log p + Gumbel is a draw from p: frequencies of 20,000 draws of one sample."""
    quality, draws = [0.0, 1.0, 2.0, 0.5], 20_000
    made = pool(quality, subset_ratio=0.25, temperature=0.7)
    assert made.subset_size == 1
    counts = torch.bincount(torch.cat([made._subset(k) for k in range(draws)]), minlength=4)
    p = torch.softmax(torch.tensor(quality).double() / 0.7, 0)
    assert torch.allclose(made.probabilities, p)
    deviation = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() < 4 * deviation).all()


def test_draws_by_quality_follow_the_weights_within_the_subset():
    """Frequencies of 20,000 draws from one subset against the weights of its samples, and against those left out."""
    made = pool([0.0, 1.0, 2.0, 0.5, 3.0, -1.0], temperature=0.7, draws_by_quality=True, subset_ratio=2 / 3)
    subset, draws = made.subset(0), 20_000
    p = torch.zeros(6, dtype=torch.float64)
    p[subset] = made.probabilities[subset] / made.probabilities[subset].sum()
    counts = torch.bincount(torch.tensor(made.stretch(0, 0, draws)), minlength=6)
    assert ((counts / draws - p).abs() <= 4 * (p * (1 - p) / draws).sqrt()).all()
    assert made.stretch(0, 7, 9) == made.stretch(0, 0, 16)[7:], "each draw follows from its place alone"
    assert (
        made.subset(0).tolist()
        == pool(made.quality_N.tolist(), temperature=0.7, subset_ratio=2 / 3).subset(0).tolist()
    )


def test_subsets_have_no_repetition_and_follow_seed_and_refresh():
    made, same, other = (pool([0.1 * i for i in range(40)], seed=s) for s in (0, 0, 1))
    assert len(set(made.subset(0).tolist())) == 20
    assert made.subset(3).tolist() == same.subset(3).tolist()
    assert made.subset(0).tolist() != made.subset(1).tolist()
    assert made.subset(0).tolist() != other.subset(0).tolist()


def test_the_tail_is_left_out():
    norms = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 4.0, 6.0, 5.0, 5.0]
    made = pool([0.0] * 10, norms, clip_quantile=0.8, subset_ratio=1.0)
    assert (~made.kept_N).nonzero().flatten().tolist() == [1, 3]
    assert made.subset_size == 8
    assert all(1 not in made.subset(k) and 3 not in made.subset(k) for k in range(20))
    assert pool([0.0] * 10, norms, clip_quantile=1.0).kept_N.all()


def test_effective_size_and_the_temperature_that_mends_it():
    assert pool([0.0] * 10).effective_size == pytest.approx(10.0)
    assert pool([0.0] * 9 + [500.0]).effective_size == pytest.approx(1.0)
    made = pool([0.0] * 9 + [20.0])
    better = pool([0.0] * 9 + [20.0], temperature=made.temperature_for(5.0))
    worse = pool([0.0] * 9 + [20.0], temperature=made.temperature_for(5.0) / 2)
    assert better.effective_size >= 5.0 > worse.effective_size
    p = made.probabilities
    assert made.effective_size == pytest.approx(float(p.sum() ** 2 / p.square().sum()))


def test_mean_percentile_is_the_place_in_the_quality_order():
    made = pool([3.0, 1.0, 2.0, 0.0, 4.0], subset_ratio=0.4)
    places = {3: 0.0, 1: 0.25, 2: 0.5, 0: 0.75, 4: 1.0}
    for refresh in range(5):
        expected = sum(places[i] for i in made.subset(refresh).tolist()) / 2
        assert made.mean_percentile(refresh) == pytest.approx(expected)


@given(
    samples=st.integers(1, 40),
    per_step=st.integers(1, 9),
    interval=st.integers(1, 7),
    total=st.integers(1, 60),
)
def test_every_step_sees_its_own_stretch_whatever_the_epoch(samples, per_step, interval, total):
    made = pool([0.0] * (2 * samples), subset_ratio=0.5)
    size = made.subset_size
    sampler = SubsetSampler(size)
    timeline = Timeline(size, per_step, interval, max(0, total - 1) // interval)
    order = SampleOrder(made, timeline)
    sampler.set_order(order)
    epochs = -(-total // timeline.steps_per_epoch)
    stream = []
    for epoch in range(epochs):
        sampler.begin_epoch(epoch * timeline.steps_per_epoch + epoch % timeline.steps_per_epoch)
        drawn = list(sampler)
        assert len(drawn) == len(sampler) == size
        # A data loader cuts an epoch into steps; the last one may be smaller.
        stream += [drawn[i : i + per_step] for i in range(0, size, per_step)]
    for step in range(total):
        assert stream[step] == order.samples_of(step)
        assert set(stream[step]) <= set(made.subset(min(step // interval, timeline.last_refresh)).tolist())
    drawn = torch.tensor([i for step in stream[:total] for i in step])
    assert order.usage(total).tolist() == torch.bincount(drawn, minlength=2 * samples).tolist()


def test_between_refreshes_every_sample_comes_once_a_turn():
    made = pool([0.0] * 12)
    turns = [made.stretch(0, 6 * turn, 6) for turn in range(3)]
    assert all(sorted(turn) == made.subset(0).tolist() for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 3
    assert made.stretch(0, 4, 5) == turns[0][4:] + turns[1][:3]


def test_before_samples_are_scored_a_sampler_has_a_length_and_no_order():
    sampler = SubsetSampler(6)
    assert len(sampler) == 6
    for use in (lambda: list(sampler), lambda: sampler.begin_epoch(0)):
        with pytest.raises(RuntimeError, match="not set yet"):
            use()


# -- samples that are scored again -----------------------------------------------------------------------------------


def test_each_refresh_draws_from_its_own_scores_and_none_before_they_are_there():
    timeline = Timeline(6, 2, 3, 2)
    order = SampleOrder(pool([0.1 * i for i in range(12)]), timeline, rescored=True)
    first = [order.samples_of(step) for step in range(3)]
    with pytest.raises(RuntimeError, match="samples of refresh 1 are drawn before they are scored again"):
        order.samples_of(3)
    second = pool([-5.0 * i for i in range(12)])
    order.add(second)
    assert [order.samples_of(step) for step in range(3)] == first, "what was drawn stays drawn"
    assert {i for step in (3, 4, 5) for i in order.samples_of(step)} == set(second.subset(1).tolist())
    assert order.usage(6).sum() == 12
    plain = SampleOrder(pool([0.0] * 12), timeline)
    assert not any(plain.missing(step, 1) for step in range(9)), "without it nothing is ever missing"


def test_scores_are_missing_from_the_step_on_at_which_samples_may_be_fetched():
    for lead in (1, 2):
        order = SampleOrder(pool([0.0] * 12), Timeline(6, 2, 3, 2), rescored=True)
        needed = []
        for step in range(9):
            while order.missing(step, lead):
                needed.append(step)
                order.add(pool([0.0] * 12))
        assert needed == [3 - lead, 6 - lead], "once for each of two refreshes"


class Recorded(SubsetSampler):
    """A sampler that notes how many samples were asked of it."""

    asked = 0

    def __iter__(self):
        for index in super().__iter__():
            self.asked += 1
            yield index


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (0, 3), (1, 1), (1, 2), (2, 3)])
def test_no_sample_is_asked_for_earlier_than_the_steps_ahead(workers, accumulation):
    """A real data loader behind accelerate's, read as the Trainer reads it: all batches of a step, then the step."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    size, batch = 40, 2
    timeline = Timeline(size, batch * accumulation, 1000, 0)
    sampler = Recorded(size)
    sampler.set_order(SampleOrder(pool([0.0] * size, subset_ratio=1.0), timeline))
    loader = DataLoader(list(range(size)), batch_size=batch, sampler=sampler, num_workers=workers)
    batches = iter(Accelerator(cpu=True).prepare_data_loader(loader))
    lead, latest = steps_ahead(workers, None, accumulation), []
    for step in range(timeline.steps_per_epoch):
        for _ in range(min(accumulation, size // batch - step * accumulation)):
            next(batches)
        latest.append((sampler.asked - 1) // (batch * accumulation) - step)
    assert max(latest) == min(lead, timeline.steps_per_epoch - 1), "and not later than needed"
