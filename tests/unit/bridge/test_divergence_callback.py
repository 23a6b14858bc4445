"""The callback of a run of a comparison: which seconds it takes for those of the steps."""

from types import SimpleNamespace

from torch import nn

from llamafactory_adaptive.bridge import divergence_callback as module


def test_what_is_measured_as_training_begins_is_no_part_of_the_steps(monkeypatch):
    """The estimate multiplies the seconds of a step; samples are scored once, by a callback that comes later."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    stop, state = module.divergence_callback(), SimpleNamespace(global_step=0)
    stop.on_train_begin(None, state, None, model=nn.Linear(1, 1))
    now.seconds += 50.0  # samples are scored
    for step in (1, 2):
        stop.on_step_begin(None, state, None)
        now.seconds += 0.5
        state.global_step = step
        stop.on_step_end(None, state, None)
    assert (stop.steps, stop.seconds) == (2, 1.0)
