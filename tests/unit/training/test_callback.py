"""The callback tells every part of every event once, in the order of the parts."""

from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.training import bound_run, callback
from llamafactory_adaptive.training.bound_run import BoundRun, RunRequest
from llamafactory_adaptive.training.callback import AdaptiveCallback
from llamafactory_adaptive.training.checkpoint_record import CheckpointRecord
from llamafactory_adaptive.training.divergence import DivergenceWatch
from llamafactory_adaptive.training.fixed_ranks import FixedRanks
from llamafactory_adaptive.training.gradient_check import GradientCheck
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.run_part import RunPart


HOOKS = {name for name in vars(RunPart) if not name.startswith("_")}
ARGS = SimpleNamespace(output_dir="out", deepspeed=None, should_save=True, save_only_model=True)
STATE = SimpleNamespace(global_step=3, max_steps=9)


class Ready:
    """A run whose parts are there already."""

    def __init__(self, parts):
        self.build_parts = lambda state, dataloader, checkpoint: parts


@pytest.fixture(autouse=True)
def _live_adapter_as_planned(monkeypatch):
    monkeypatch.setattr(PlanGuard, "verify_live", lambda self, model, watches_gradients: None)


def recorder(name, told):
    """A part that takes down every event it is told of, with what it is given."""
    hooks = {hook: lambda self, *given, hook=hook: told.append((name, hook, given)) for hook in HOOKS}
    return type("Recorder", (RunPart,), hooks)()


def made(**request):
    return AdaptiveCallback(PlanGuard(None, RunLog("igu", 0.0)), RunRequest(3, **request))


# What the Trainer calls, and what a part is to hear of it.
EVENTS = {
    "announce": (lambda c: c.on_train_begin(ARGS, STATE, None, model="m"), (ARGS, STATE)),
    "begin_epoch": (lambda c: c.on_epoch_begin(ARGS, STATE, None), (STATE,)),
    "begin_step": (lambda c: c.on_step_begin(ARGS, STATE, None, lr_scheduler="rates", model="m"), (STATE, "rates")),
    "end_micro_batch": (lambda c: c.on_substep_end(ARGS, STATE, None), ()),
    "see_loss": (lambda c: c.see_loss("loss"), ("loss",)),
    "see_gradients": (lambda c: c.see_gradients(), ()),
    "before_step": (lambda c: c.on_pre_optimizer_step(ARGS, STATE, None, model="m", optimizer="o"), ("m",)),
    "after_step": (lambda c: c.on_step_end(ARGS, STATE, None, model="m", optimizer="o"), (ARGS, STATE, "m", "o")),
    "add_figures": (lambda c: c.on_log(ARGS, STATE, None, logs={"loss": 1.0}), (STATE, {"loss": 1.0})),
    "save": (lambda c: c.save_into("folder", ARGS, STATE), ("folder", ARGS, STATE)),
    "end": (lambda c: c.on_train_end(ARGS, STATE, None, model="m"), (ARGS, STATE, "m")),
}


def test_every_event_of_a_part_is_tried_here():
    assert set(EVENTS) == HOOKS


@pytest.mark.parametrize("hook", EVENTS)
def test_each_part_is_told_once_and_in_order(hook):
    event, given = EVENTS[hook]
    told = []
    forwarding = made()
    forwarding.parts = tuple(recorder(name, told) for name in ("first", "second", "third"))
    forwarding.bound = Ready(forwarding.parts)
    event(forwarding)
    assert told == [(name, hook, given) for name in ("first", "second", "third")]


@pytest.mark.parametrize("hook", EVENTS)
def test_an_event_that_a_part_does_not_define_is_nothing_to_it(hook):
    event, given = EVENTS[hook]
    told = []
    forwarding = made()
    forwarding.parts = (RunPart(), recorder("later", told))
    forwarding.bound = Ready(forwarding.parts)
    event(forwarding)
    assert told == [("later", hook, given)], "the next part is told as if the first were not there"


def test_a_part_that_refuses_keeps_later_parts_from_going_on():
    told = []

    class Refusing(RunPart):
        def after_step(self, args, state, model, optimizer):
            raise GuardError("no further")

    forwarding = made()
    forwarding.parts = (recorder("before", told), Refusing(), recorder("after", told))
    with pytest.raises(GuardError, match="no further"):
        EVENTS["after_step"][0](forwarding)
    assert [name for name, *_ in told] == ["before"]


@pytest.mark.parametrize("save_only_model", [True, False])
def test_the_save_event_counts_where_the_trainer_passes_over_its_own(monkeypatch, save_only_model):
    told = []
    monkeypatch.setattr(callback, "seal", lambda folder, args: told.append(("seal", folder.as_posix())))
    forwarding = made()
    forwarding.parts = (recorder("part", told),)
    args = SimpleNamespace(output_dir="out", save_only_model=save_only_model)
    forwarding.on_save(args, STATE, None)
    assert [(who, what) for who, what, *_ in told] == (
        [("part", "save"), ("seal", "out/checkpoint-3")] if save_only_model else []
    )


# -- a run is put together -------------------------------------------------------------------------------------------


def trainer(callbacks=(), deepspeed=None):
    args = SimpleNamespace(output_dir="out", deepspeed=deepspeed, should_save=False)
    handler = SimpleNamespace(callbacks=list(callbacks))
    return SimpleNamespace(args=args, model=torch.nn.Module(), callback_handler=handler)


def test_a_fixed_run_verifies_first_and_has_its_parts_in_order(monkeypatch):
    happened = []
    forwarding = made(layout={"processes": 1})
    monkeypatch.setattr(PlanGuard, "verify_live", lambda self, model, watches_gradients: happened.append("live"))
    monkeypatch.setattr(bound_run, "agree_on_steps", lambda *facts: happened.append("steps"))
    monkeypatch.setattr(FixedRanks, "announce", lambda self, args, state: happened.append("announced"))
    given = trainer()
    forwarding.bind_trainer(given)
    assert (forwarding.parts, forwarding.train_sampler, happened) == ((), None, [])
    forwarding.on_train_begin(given.args, SimpleNamespace(global_step=0, max_steps=9), None, model=None)
    assert happened == ["live", "steps", "announced"]
    assert [type(part) for part in forwarding.parts] == [
        PlanGuard, DivergenceWatch, GradientCheck, FixedRanks, CheckpointRecord
    ]  # fmt: skip
    guard, watch, gradients, ranks, record = forwarding.parts
    assert gradients.counters is guard.counters
    assert guard is forwarding.guard is ranks.guard
    assert watch.limit == 3
    assert (ranks.selection, record.layout) == (None, {"processes": 1})


def test_deepspeed_keeps_gradients_where_no_part_can_check_them():
    forwarding, given = made(), trainer(deepspeed="zero2.json")
    forwarding.bind_trainer(given)
    parts = forwarding.bound.build_parts(SimpleNamespace(global_step=0, max_steps=9), None, None)
    assert [type(part) for part in parts] == [PlanGuard, DivergenceWatch, FixedRanks, CheckpointRecord]


def test_a_fixed_run_keeps_its_plan_and_its_position():
    others = ["a logger", "another"]
    forwarding = made()
    given = trainer([*others, forwarding])
    forwarding.bind_trainer(given)
    assert given.callback_handler.callbacks == [*others, forwarding]
    assert forwarding.current_plan() is forwarding.guard.plan


def test_a_search_comes_before_loggers_which_find_its_figures(monkeypatch):
    class Bound:
        samples = None

        def __init__(self, request, guard, trainer, see_gradients):
            self.see_gradients = see_gradients

    monkeypatch.setattr(callback, "BoundRun", Bound)
    forwarding, told = made(search="a request"), []
    given = trainer(["a logger", forwarding])
    forwarding.bind_trainer(given)
    assert given.callback_handler.callbacks == [forwarding, "a logger"]
    forwarding.parts = (recorder("part", told),)
    forwarding.bound.see_gradients()  # the hook in the Trainer's step reaches the parts
    assert told == [("part", "see_gradients", ())]


def test_a_trainer_that_did_not_pass_itself_on_is_refused():
    with pytest.raises(GuardError, match=r"its Trainer did not pass itself to the run$"):
        made().on_train_begin(trainer().args, STATE, None, model=None)
    advised = AdaptiveCallback(PlanGuard(None, RunLog("igu", 0.0)), RunRequest(3), remedy="make it otherwise")
    with pytest.raises(GuardError, match=r"its Trainer did not pass itself to the run; make it otherwise$"):
        advised.on_train_begin(trainer().args, STATE, None, model=None)


def test_a_checkpoint_counts_only_where_steps_were_made(monkeypatch):
    resumed = []

    def fixed_ranks(self, state, dataloader, checkpoint):
        resumed.append(checkpoint)
        return (None,)

    monkeypatch.setattr(BoundRun, "_fixed_ranks", fixed_ranks)
    given = trainer()
    forwarding = AdaptiveCallback(PlanGuard(None, RunLog("igu", 0.0)), RunRequest(3), checkpoint="checkpoint-3")
    forwarding.bind_trainer(given)
    for step in (0, 3):
        forwarding.on_train_begin(given.args, SimpleNamespace(global_step=step, max_steps=9), None, model=None)
    assert resumed == [None, "checkpoint-3"]


def test_a_trainer_that_resumed_from_an_unknown_checkpoint_is_refused():
    forwarding, given = made(), trainer()
    forwarding.bind_trainer(given)
    with pytest.raises(GuardError, match=r"resumed at step 3, but .* pass resume_from_checkpoint to the Trainer's"):
        forwarding.on_train_begin(given.args, STATE, None, model=None)
