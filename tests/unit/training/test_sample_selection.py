"""Training samples chosen under a Trainer: scored once, drawn alike after a resume, told of in a report."""

import json
from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive.errors import CalibrationError, GuardError, PlanError
from llamafactory_adaptive.reports.data_report import read_data_report
from llamafactory_adaptive.training import sample_scoring
from tests.helpers.sample_runs import SAMPLES, SAVED, STEPS, live_adapter, scored_again
from tests.helpers.samples import inputs
from tests.helpers.tiny import rows


# -- scores ----------------------------------------------------------------------------------------------------------


def test_each_samples_loss_is_the_models_own_on_it(begin, model):
    losses = begin().scored[0].loss
    with torch.no_grad():
        expected = [float(model(**inputs([row])).loss) for row in rows(SAMPLES)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_epoch_is_a_subset_in_whole_batches(begin):
    assert len(begin().sampler) == 6
    assert len(begin(samples=rows(10)).sampler) == 6, "five samples, filled up to batches of two"


def test_scoring_leaves_the_random_state_to_training(begin):
    torch.manual_seed(8)
    before = torch.get_rng_state()
    begin()
    assert torch.equal(torch.get_rng_state(), before)


def test_scores_are_kept_for_runs_that_would_find_the_same(begin, monkeypatch):
    first = begin()
    monkeypatch.setattr(sample_scoring, "measure", scored_again)
    again = begin(seed=4, temperature=5.0, subset_ratio=0.75)
    pairs = zip(vars(again.scored[0]).values(), vars(first.scored[0]).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for other in (
        {"identity": "b"},
        {"samples": rows(SAMPLES, seed=1)},
        {"live": live_adapter(seed=1)},
        {"loss_drop": "exact"},
        {"alignment_weight": 1.0},
    ):
        with pytest.raises(AssertionError, match="scored again"):
            begin(**other)


def test_a_damaged_cache_entry_is_made_anew(begin, tmp_path):
    first = begin()
    (entry,) = (tmp_path / "cache").glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:-8] + b"\0" * 8)
    assert begin().digest() == first.digest()
    assert entry.with_name(f"{entry.name}.damaged").exists()


def test_a_resumed_run_draws_as_the_first_did_whatever_the_cache_says(begin, tmp_path, monkeypatch):
    first = begin()
    first.save(tmp_path / "checkpoint-4", SAVED, None)
    monkeypatch.setattr(sample_scoring, "measure", scored_again)
    again = begin(resumed=tmp_path / "checkpoint-4", live=live_adapter(seed=1))
    assert again.digest() == first.digest()
    assert [again.sampler.order.samples_of(step) for step in range(STEPS)] == [
        first.sampler.order.samples_of(step) for step in range(STEPS)
    ]
    changed = rows(SAMPLES)
    changed[3]["labels"] = [-100, *changed[3]["labels"][1:-1], 7]
    with pytest.raises(PlanError, match=r"checkpoint-4 holds no qualities of these training samples"):
        begin(resumed=tmp_path / "checkpoint-4", samples=changed)


def test_pictures_are_refused_before_anything_is_scored(begin, monkeypatch):
    monkeypatch.setattr(sample_scoring, "measure", scored_again)
    samples = rows(SAMPLES)
    samples[-1]["images"] = ["cat.png"]
    with pytest.raises(CalibrationError, match="tsq_sampling: false"):
        begin(samples=samples)


def test_a_data_loader_that_counts_otherwise_is_refused(begin):
    with pytest.raises(GuardError, match="makes 4 steps of an epoch, the sampler 3: leave accelerator_config"):
        begin(steps_of_epoch=4)


# -- draws -----------------------------------------------------------------------------------------------------------


def test_subsets_change_with_the_refresh_and_the_log_says_by_how_much(begin):
    selection = begin()
    assert [step for step in range(STEPS) if selection.begins_at(step)] == [2, 4, 6, 8]
    for step in (0, 2, 3):
        figures = selection.figures(step)
        number = step // 2
        now = set(selection.pool.subset(number).tolist())
        before = set(selection.pool.subset(number - 1).tolist()) if number else set()
        assert (figures["subset"], figures["subset_size"], figures["subset_new"]) == (number, 6, len(now - before))
        quality = selection.pool.quality_N.tolist()
        assert figures["mean_quality"] == pytest.approx(sum(quality[i] for i in now) / 6)


def test_the_budget_follows_the_place_of_the_subset_in_the_quality_order(begin):
    assert begin().budget_share(4) == 1.0
    selection = begin(phi="quality")
    order = sorted(range(SAMPLES), key=lambda index: float(selection.pool.quality_N[index]))
    places = [order.index(index) / (SAMPLES - 1) for index in selection.pool.subset(2).tolist()]
    assert selection.budget_share(4) == pytest.approx(0.5 + 0.5 * sum(places) / 6)


def test_collapsed_weights_are_told_of_with_a_temperature_that_mends_them(begin, caplog):
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        begin()
    assert "collapsed" not in caplog.text
    samples = rows(40)
    samples[0]["labels"] = [-100] * (len(samples[0]["input_ids"]) - 1) + [5]
    with caplog.at_level("WARNING", "llamafactory.adaptive"):
        collapsed = begin(samples=samples, temperature=0.01)
    assert collapsed.pool.effective_size < 0.1 * 20
    (said,) = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert "or leave outliers out with tsq_clip_quantile: 0.95" in said
    advised = float(said.split("raise tsq_temperature from 0.01 to ")[1].split(",")[0])
    assert begin(samples=samples, temperature=advised).pool.effective_size >= 0.1 * 20


# -- what is told of the data ----------------------------------------------------------------------------------------


def test_the_report_counts_what_was_drawn_and_shows_texts_unless_they_would_be_pushed(begin, tmp_path):
    selection = begin()
    selection.report(tmp_path / "out", STEPS)
    report = read_data_report(tmp_path / "out")
    drawn = [index for step in range(STEPS) for index in selection.sampler.order.samples_of(step)]
    assert (report["samples"], report["samples_used"], report["steps"]) == (SAMPLES, len(set(drawn)), STEPS)
    assert report["most_used"] == max(map(drawn.count, drawn))
    selection.trainer.args.push_to_hub = True
    selection.report(tmp_path / "pushed", STEPS)
    shown = json.loads((tmp_path / "pushed" / "adaptive_data_quality.json").read_text())
    assert {sample["prompt"] for sample in shown["best"]} == {"(left out: push_to_hub)"}


def test_prompt_and_answer_part_where_the_loss_begins(begin):
    tokens = list(b"ask me:ok")
    samples = [{"input_ids": tokens, "labels": [-100] * 7 + tokens[7:]}, {"input_ids": tokens}, *rows(10)]
    selection = begin()
    selection.dataset = samples
    selection.trainer.processing_class = SimpleNamespace(decode=lambda ids, skip_special_tokens: bytes(ids).decode())
    assert selection._text(0) == ("ask me:", "ok")
    assert selection._text(1) == ("", "ask me:ok")
