"""Samples that are scored again at refreshes, and clusters of samples, under what stands for a Trainer."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive.errors import GuardError, PlanError
from llamafactory_adaptive.sampling.pool import Pool
from llamafactory_adaptive.training import sample_scoring, sample_selection
from llamafactory_adaptive.training.sample_selection import starved_cluster
from tests.helpers.sample_runs import SAVED, STEPS, live_adapter, scored_again


# -- samples that are scored again -----------------------------------------------------------------------------------


def trained(live, steps):
    """The adapter of ``live`` after some steps of a training that moves every factor at each."""
    for step in range(steps[0], steps[1]):
        generator = torch.Generator().manual_seed(100 + step)
        for name, parameter in live.named_parameters():
            if "lora_" in name:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return live


def train_on(selection, live, steps, folder):
    """Steps as the Trainer makes them: the samples of each, and what follows it."""
    folder.mkdir(exist_ok=True)
    arguments, drawn = SimpleNamespace(should_save=True, output_dir=str(folder)), []
    for step in range(*steps):
        drawn.append(selection.order.samples_of(step))
        trained(live, (step, step + 1))
        selection.after_step(arguments, SimpleNamespace(global_step=step + 1), live, None)
    return drawn


def test_samples_are_scored_again_before_each_refresh_and_the_log_says_what_it_took(begin, tmp_path, monkeypatch):
    clock = itertools.count(step=2.5)  # every look at it is 2.5 s after the last
    monkeypatch.setattr(sample_selection, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    selection = begin(live=(live := live_adapter()), refresh_quality=True)
    train_on(selection, live, (0, STEPS), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "adaptive_log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["event"], line["subset"]) for line in lines] == [
        (1, "scoring", 1), (3, "scoring", 2), (5, "scoring", 3), (7, "scoring", 4)
    ]  # fmt: skip
    assert [line["scoring_seconds"] for line in lines] == [2.5] * 4
    assert [line["overhead_seconds"] for line in lines] == [2.5, 5.0, 7.5, 10.0]
    assert selection.log.overhead_seconds == 10.0
    for refresh, step in ((0, 0), (1, 1), (4, 7)):
        fresh = begin(live=trained(live_adapter(), (0, step)))
        assert torch.equal(selection.scored[refresh].gradient_norm, fresh.scored[0].gradient_norm)
        assert torch.equal(selection.order.pool(refresh).quality_N, fresh.pool.quality_N)
        assert torch.equal(selection.scored[refresh].cluster, selection.scored[0].cluster), "clusters stay"
    assert not torch.equal(selection.scored[1].gradient_norm, selection.scored[0].gradient_norm)


def test_a_run_that_scores_again_resumes_bit_for_bit(begin, tmp_path, monkeypatch):
    """From step 5, at which samples were scored for the refresh at step 6; the next time is step 7."""
    first = begin(live=(live := live_adapter()), refresh_quality=True)
    before = train_on(first, live, (0, 5), tmp_path / "out")
    first.save(tmp_path / "checkpoint-5", SAVED, None)
    kept = {name: parameter.clone() for name, parameter in live.named_parameters()}
    after = train_on(first, live, (5, STEPS), tmp_path / "out")
    live.load_state_dict(kept, strict=False)
    with monkeypatch.context() as patch:
        patch.setattr(sample_scoring, "measure", scored_again)
        again = begin(resumed=tmp_path / "checkpoint-5", live=live, refresh_quality=True)
        again.rescore(SimpleNamespace(should_save=False), 5)
    assert len(again.scored) == 4
    assert [again.order.samples_of(step) for step in range(5)] == before
    assert train_on(again, live, (5, STEPS), tmp_path / "out") == after
    assert again.digest() == first.digest()
    assert torch.equal(again.order.usage(STEPS), first.order.usage(STEPS))


def test_a_run_that_fetches_further_ahead_after_a_resume_scores_what_it_needs(begin, tmp_path):
    first = begin(live=(live := live_adapter()), refresh_quality=True, refresh_ratio=0.5)
    train_on(first, live, (0, 2), tmp_path / "out")
    first.save(tmp_path / "checkpoint-2", SAVED, None)
    again = begin(resumed=tmp_path / "checkpoint-2", live=live, refresh_quality=True, refresh_ratio=0.5, workers=1)
    assert (len(first.scored), len(again.scored), again.lead) == (1, 1, 3)
    again.rescore(SimpleNamespace(should_save=False), 2)
    assert len(again.scored) == 2
    assert len(again.order.samples_of(4)) == 2


def test_refreshes_that_follow_faster_than_samples_are_fetched_are_refused_before_scoring(begin, monkeypatch):
    monkeypatch.setattr(sample_scoring, "measure", scored_again)
    with pytest.raises(GuardError, match=r"fetched 5 steps ahead.* every 2 steps.*set dataloader_num_workers: 0 or"):
        begin(refresh_quality=True, workers=2)
    with pytest.raises(GuardError, match=r"fetched 1 steps ahead.* every 1 steps.*set train more steps"):
        begin(refresh_quality=True, refresh_ratio=0.1)


# -- clusters --------------------------------------------------------------------------------------------------------


def test_the_log_tells_the_shares_of_clusters_and_a_floor_holds_them(begin):
    held = begin(clusters=3, min_cluster_share=1.0).figures(0)
    shares = held["cluster_pool_shares"]
    assert sum(shares) == pytest.approx(1.0, abs=1e-3)
    assert all(drawn >= int(share * 6) / 6 - 1e-4 for share, drawn in
               zip(shares, held["cluster_draw_shares"], strict=True))  # fmt: skip
    assert "cluster_pool_shares" not in begin(clusters=0).figures(0)


def test_a_kind_that_is_nearly_left_out_is_warned_of_with_a_key(begin, caplog):
    selection = begin()
    cluster = torch.tensor([0] * 28 + [1] * 12)
    starving = Pool((-9.0 * cluster).double(), cluster.double(), selection.sampling, 0, cluster)
    number, share, drawn = starved_cluster(starving, 0)
    assert (number, share) == (1, pytest.approx(0.3))
    assert drawn == pytest.approx(float((starving.subset(0) >= 28).sum()) / 20)
    selection.order.pools[0] = starving
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        selection.warn_of_weights()
    assert f"cluster 1 of the samples' gradients holds 30% of the samples and gets {drawn:.0%} of" in caplog.text
    assert "set tsq_min_cluster_share: 0.5" in caplog.text
    guarded = replace(selection.sampling, min_cluster_share=0.5)
    assert starved_cluster(Pool(starving.quality_N, cluster.double(), guarded, 0, cluster), 0) is None
    few = torch.tensor([0] * 36 + [1] * 4)
    assert starved_cluster(Pool((-9.0 * few).double(), few.double(), selection.sampling, 0, few), 0) is None


def test_a_checkpoint_of_an_earlier_version_has_no_clusters(begin, tmp_path):
    first = begin(clusters=0)
    first.save(tmp_path / "checkpoint-4", SAVED, None)
    again = begin(resumed=tmp_path / "checkpoint-4")
    assert [again.order.samples_of(step) for step in range(STEPS)] == [
        first.order.samples_of(step) for step in range(STEPS)
    ]
    with pytest.raises(PlanError, match=r"no clusters .* tsq_min_cluster_share: 0\.5 needs; leave it out"):
        begin(resumed=tmp_path / "checkpoint-4", min_cluster_share=0.5)
