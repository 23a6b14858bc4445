"""Which evaluations count as the best, and what is said where too few of them do."""

import logging
from types import SimpleNamespace

import pytest
from transformers import EarlyStoppingCallback

from llamafactory_adaptive.ranks.schedule import Refreshes, Schedule
from llamafactory_adaptive.training.best_model import BestModel, evaluations_from
from llamafactory_adaptive.training.run_log import RunLog


SCHEDULE = Schedule(10, 70, 10, 200, 100)


def rule(best_model_from="final", final=False, schedule=SCHEDULE, callbacks=()):
    search = SimpleNamespace(config=SimpleNamespace(best_model_from=best_model_from), final=final)
    return BestModel(search, schedule, RunLog("igu", 0.0), list(callbacks))


def arguments(**more):
    return SimpleNamespace(**{"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps",
                              "eval_delay": 0, "max_steps": 100, "num_train_epochs": 3.0, "should_save": True,
                              **more})  # fmt: skip


def state(best=None, eval_steps=10, max_steps=100):
    folder = None if best is None else f"out/checkpoint-{best}"
    return SimpleNamespace(max_steps=max_steps, eval_steps=eval_steps, best_metric=best, best_global_step=best,
                           best_model_checkpoint=folder)  # fmt: skip


@pytest.mark.parametrize(
    ("best_model_from", "final", "counts"), [("final", False, False), ("final", True, True), ("start", False, True)]
)
def test_evaluations_count_once_ranks_are_final_or_from_the_start(best_model_from, final, counts):
    assert rule(best_model_from, final).counts_as_best() is counts


@pytest.mark.parametrize(
    ("args", "eval_steps", "count"),
    [
        ({}, 10, 4),  # 70, 80, 90, 100
        ({}, 40, 2),  # 80 and, since the Trainer evaluates there, 100
        ({}, 500, 1),
        ({"eval_delay": 85}, 10, 2),
        ({"eval_delay": 101}, 10, 0),
        ({"eval_strategy": "epoch", "max_steps": -1}, 10, 1),
        ({"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 10.0}, 10, 4),
        ({"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 10.0, "eval_delay": 9}, 10, 2),
        ({"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2.5}, 10, None),
        ({"eval_strategy": "epoch"}, 10, None),
        ({"eval_strategy": "no"}, 10, None),
    ],
)
def test_evaluations_that_will_count_are_known_before_training(args, eval_steps, count):
    assert evaluations_from(70, arguments(**args), state(eval_steps=eval_steps)) == count


def test_too_few_evaluations_are_warned_of_once():
    best = rule(callbacks=[EarlyStoppingCallback()])
    best.announce(arguments(), state(eval_steps=500))
    assert best.log.warnings == [
        "only one evaluation comes after the ranks are final (step 70 of 100) and earlier ones do not count, so "
        "load_best_model_at_end and early stopping cannot choose, and the last adapter is saved; evaluate more often "
        "(eval_steps: 7), raise adaptive_final_ratio, or set adaptive_best_model_from: start"
    ]
    best.end(arguments(), state(), None)
    assert len(best.log.warnings) == 1


def test_a_method_that_moves_ranks_about_is_not_told_of_a_ratio_it_does_not_read():
    best = rule(schedule=Refreshes(25, 75, 100))
    best.announce(arguments(eval_delay=101, load_best_model_at_end=False, save_strategy="best"), state())
    (said,) = best.log.warnings
    assert said.startswith("no evaluation comes after the ranks are final (step 75 of 100)")
    assert "so save_strategy: best cannot choose" in said
    assert said.endswith("evaluate more often (eval_steps: 6), or set adaptive_best_model_from: start")


@pytest.mark.parametrize(
    ("best", "args", "eval_steps"),
    [
        (rule("start"), {}, 500),
        (rule(), {"load_best_model_at_end": False}, 500),
        (rule(), {}, 10),
        (rule(), {"eval_strategy": "epoch"}, 10),
        (rule(), {"should_save": False}, 500),
    ],
)
def test_nothing_is_said_where_all_is_well_or_nothing_depends_on_it(best, args, eval_steps):
    best.announce(arguments(**args), state(eval_steps=eval_steps))
    assert best.log.warnings == []


def test_the_end_says_that_there_was_none_to_load_where_that_could_not_be_known():
    best = rule()
    best.announce(arguments(eval_strategy="epoch"), state())
    best.end(arguments(), state(best=80), None)
    assert best.log.warnings == []
    best.end(arguments(), state(), None)
    assert best.log.warnings == [
        "no checkpoint was evaluated after the ranks were final (step 70), so there is none that "
        "load_best_model_at_end could load; the last adapter is saved"
    ]


@pytest.mark.parametrize(("best", "kept"), [(60, None), (70, 70), (80, 80)])
def test_a_best_evaluation_from_before_the_ranks_were_final_is_dropped_on_resume(best, kept, caplog):
    resumed = state(best=best)
    with caplog.at_level(logging.INFO, logger="llamafactory.adaptive"):
        rule().announce(arguments(), resumed)
    assert (resumed.best_metric, resumed.best_global_step) == (kept, kept)
    assert (resumed.best_model_checkpoint is None) == (kept is None)
    assert ("(step 60) no longer counts" in caplog.text) == (kept is None)
    untouched = state(best=60)
    rule("start").announce(arguments(), untouched)
    assert untouched.best_global_step == 60
