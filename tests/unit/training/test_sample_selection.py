"""Training samples chosen under a Trainer: scored once, drawn alike after a resume, told of in a report."""

import json
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.errors import CalibrationError, GuardError, PlanError
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.reports.data_report import read_data_report
from llamafactory_adaptive.sampling.pool import Pool
from llamafactory_adaptive.training import sample_scoring
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.sample_preparation import TrainingSamples
from llamafactory_adaptive.training.sample_scoring import SampleRequest
from llamafactory_adaptive.training.sample_selection import starved_cluster
from tests.helpers.dynamic import start_plan
from tests.helpers.tiny import rows, tiny_model, tiny_tokenizer


SAMPLES = 12
STEPS = 9  # refreshes after 2, 4, 6 and 8
PLAN = start_plan(tiny_model())
SAVED = SimpleNamespace(should_save=True)


def collate(samples):
    (one,) = make_batches(samples, len(samples), 0)
    return {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": one.labels}


def adapted(seed=0):
    """A tiny model with an adapter whose factors are not zero."""
    base = tiny_model()
    model = peft.get_peft_model(
        base, peft.LoraConfig(**lora_config_arguments(start_plan(base)), task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.fixture
def begin(model, tmp_path):
    """Begin a run on samples; returns its selection."""

    def make(resumed=None, samples=None, seed=3, identity="a", live=model, steps_of_epoch=None, workers=0,
             **options):  # fmt: skip
        samples = rows(SAMPLES) if samples is None else samples
        arguments = SimpleNamespace(
            remove_unused_columns=False, train_batch_size=2, world_size=1, gradient_accumulation_steps=1,
            device=torch.device("cpu"), dataloader_num_workers=workers, dataloader_prefetch_factor=None,
            learning_rate=1e-3, bf16=False, fp16=False,
            deepspeed=None, push_to_hub=False,
        )  # fmt: skip
        trainer = SimpleNamespace(args=arguments, train_dataset=samples, model=live, data_collator=collate,
                                  processing_class=tiny_tokenizer())  # fmt: skip
        (tmp_path / "cache").mkdir(exist_ok=True)
        settings = TsqOptions(**{"subset_ratio": 0.5, "temperature": 2.0, "refresh_ratio": 0.25, **options})
        request = SampleRequest(Tsq(settings).sampling, seed, {"model": identity}, tmp_path / "cache")
        prepared = TrainingSamples(request, trainer)
        dataloader = range(steps_of_epoch or len(prepared.sampler) // 2)
        return prepared.prepare_samples(PLAN, STEPS, dataloader, resumed, RunLog("tsq", 0.0))

    return make


# -- scores ----------------------------------------------------------------------------------------------------------


def test_each_samples_loss_is_the_models_own_on_it(begin, model):
    found = begin().scored[0].loss
    with torch.no_grad():
        expected = [float(model(**collate([row])).loss) for row in rows(SAMPLES)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_an_epoch_is_a_subset_in_whole_batches(begin):
    assert len(begin().sampler) == 6
    assert len(begin(samples=rows(10)).sampler) == 6, "five samples, filled up to batches of two"


def test_scoring_leaves_the_random_state_to_training(begin):
    torch.manual_seed(8)
    before = torch.get_rng_state()
    begin()
    assert torch.equal(torch.get_rng_state(), before)


def scored_again(*_, **__):
    raise AssertionError("samples were scored again")


def test_scores_are_kept_for_runs_that_would_find_the_same(begin, monkeypatch):
    first = begin()
    monkeypatch.setattr(sample_scoring, "measure", scored_again)
    again = begin(seed=4, temperature=5.0, subset_ratio=0.75)
    pairs = zip(vars(again.scored[0]).values(), vars(first.scored[0]).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for other in (
        {"identity": "b"},
        {"samples": rows(SAMPLES, seed=1)},
        {"live": adapted(seed=1)},
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
    again = begin(resumed=tmp_path / "checkpoint-4", live=adapted(seed=1))
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


def test_samples_are_scored_again_before_each_refresh_and_the_log_says_what_it_took(begin, tmp_path):
    selection = begin(live=(live := adapted()), refresh_quality=True)
    train_on(selection, live, (0, STEPS), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "adaptive_log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["event"], line["subset"]) for line in lines] == [
        (1, "scoring", 1), (3, "scoring", 2), (5, "scoring", 3), (7, "scoring", 4)
    ]  # fmt: skip
    seconds = sum(line["scoring_seconds"] for line in lines)
    assert selection.log.overhead_seconds == pytest.approx(seconds, abs=0.002)
    assert lines[-1]["overhead_seconds"] == pytest.approx(seconds, abs=0.002)
    for refresh, step in ((0, 0), (1, 1), (4, 7)):
        fresh = begin(live=trained(adapted(), (0, step)))
        assert torch.equal(selection.scored[refresh].gradient_norm, fresh.scored[0].gradient_norm)
        assert torch.equal(selection.order.pool(refresh).quality_N, fresh.pool.quality_N)
        assert torch.equal(selection.scored[refresh].cluster, selection.scored[0].cluster), "clusters stay"
    assert not torch.equal(selection.scored[1].gradient_norm, selection.scored[0].gradient_norm)


def test_a_run_that_scores_again_resumes_bit_for_bit(begin, tmp_path, monkeypatch):
    """From step 5, at which samples were scored for the refresh at step 6; the next time is step 7."""
    first = begin(live=(live := adapted()), refresh_quality=True)
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
    first = begin(live=(live := adapted()), refresh_quality=True, refresh_ratio=0.5)
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
