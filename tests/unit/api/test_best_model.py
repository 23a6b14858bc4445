"""Load best, early stopping and evaluations of a search under transformers' own Trainer."""

import json
import logging

import pytest
from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from llamafactory_adaptive.adapter.lora import live_layers
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.searches import given_to, searching
from tests.helpers.tiny import rows, tiny_model


# Eight steps; ranks are chosen at steps 2 and 4, where they are final.
SEARCH = {"warmup_ratio": 0.0, "final_ratio": 0.5}
EACH_STEP = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {**EACH_STEP, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}


class EverWorse(TrainerCallback):
    """Makes every evaluation worse than the one before."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_loss"] = float(state.global_step)


def trained(folder, search, resume=None, patience=2, **more):
    given = {**given_to(search, folder, **{**BEST, **more}), "eval_dataset": rows(4, seed=9)}
    trainer = search.trainer(Trainer)(**given, callbacks=[EverWorse(), EarlyStoppingCallback(patience)])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder))
    return trainer.state, search.finalize(folder)


@pytest.mark.parametrize(("best_model_from", "best", "last"), [("final", 4, 6), ("start", 1, 3)])
def test_the_best_one_and_the_end_follow_the_evaluations_that_count(best_model_from, best, last, tmp_path):
    state, plan = trained(tmp_path, searching(**SEARCH, best_model_from=best_model_from))
    assert (state.best_global_step, state.best_metric, state.global_step) == (best, best, last)
    assert state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    if best_model_from == "final":
        assert plan.ranks() == load_plan(tmp_path / "checkpoint-4" / "adaptive_rank_plan.json").ranks()
        log = [json.loads(line) for line in (tmp_path / "adaptive_log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log if line["event"] == "allocation"] == [2, 4], "the best one is not cut"


def test_a_resumed_search_counts_as_one_that_was_never_stopped(tmp_path):
    trained(tmp_path / "first", searching(**SEARCH, best_model_from="start"))  # its best is step 1
    state, _ = trained(tmp_path / "second", searching(**SEARCH), resume=str(tmp_path / "first" / "checkpoint-2"))
    assert (state.best_global_step, state.global_step) == (4, 6)


def test_saving_the_best_alone_begins_with_the_final_ranks(tmp_path):
    state, _ = trained(tmp_path, searching(**SEARCH), save_strategy="best")
    assert state.best_global_step == 4
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_metric_that_does_not_exist_is_found_at_the_first_evaluation(tmp_path):
    search = searching(**SEARCH)
    with pytest.raises(KeyError, match="eval_accuracy"):
        trained(tmp_path, search, metric_for_best_model="accuracy")
    assert search.callback.guard.counters.steps == 1


def test_without_an_evaluation_that_counts_the_last_adapter_is_saved(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="llamafactory.adaptive"):
        state, _ = trained(tmp_path, searching(**SEARCH), eval_delay=9)
    assert (state.best_model_checkpoint, state.global_step) == (None, 8)
    said = (
        "so load_best_model_at_end and early stopping cannot choose, and the last adapter is saved; evaluate more "
        "often (eval_steps=1)"
    )
    assert f"no evaluation comes after the ranks are final (step 4 of 8) and earlier ones do not count, {said}" in (
        caplog.text
    )
    assert "raise final_ratio, or set best_model_from='start'" in caplog.text


def test_another_word_than_those_is_refused():
    with pytest.raises(AdaptiveConfigError, match="best_model_from: 'end' is invalid: must be one of final, start"):
        searching(best_model_from="end")


def test_an_evaluation_is_that_of_the_adapter_saved_with_it_at_the_mended_strength(tmp_path):
    """IGU-LoRA as published trains under random shrinkage; what is evaluated is what plain PEFT loads."""
    strengths = {}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            strengths[state.global_step] = search.callback.bound.search.triplets.position.factor

    published = {"variant": "published", "mend_strength": True, "importance": None}
    search = searching(**SEARCH, **published)
    given = {**given_to(search, tmp_path, **EACH_STEP, learning_rate=0.3), "eval_dataset": rows(4, seed=9)}
    trainer = search.trainer(Trainer)(**given, callbacks=[Watch()])
    trainer.train()
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    mended = search._request.method.shrinkage.strength
    assert strengths == {step: mended if step < 4 else 1.0 for step in range(1, 9)}
    assert mended == pytest.approx(0.61, abs=0.01)
    for step in (1, 3, 4, 8):
        plain = PeftModel.from_pretrained(tiny_model(), tmp_path / f"checkpoint-{step}")
        alone = Trainer(**{**given, "model": plain})
        assert alone.evaluate()["eval_loss"] == pytest.approx(logged[step], rel=1e-6)
        for layer, adapter in live_layers(plain).values():
            layer.scaling[adapter] /= mended
        assert abs(alone.evaluate()["eval_loss"] - logged[step]) > 1e-4, "another strength would be seen"
