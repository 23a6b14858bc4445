"""When a run is given up: losses, and steps that a loss scaler skips."""

import pytest
import torch
from torch import nn

from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.training.divergence import DivergenceWatch


NAN, GOOD = torch.tensor(float("nan")), torch.tensor(1.0)


def steps_until_the_end(watch, losses, skipped):
    for step, (loss, was_skipped) in enumerate(zip(losses, skipped, strict=True), start=1):
        watch.see_loss(loss)
        try:
            watch.end_step(step, nn.Linear(1, 1), was_skipped)
        except GuardError as error:
            return step, str(error)
    return None, ""


def test_skipped_steps_end_a_run_only_where_no_scale_can_help(tmp_path):
    """A scale of 2**16 is nothing long before 40 halvings; a run that finds its scale skips fewer."""
    finds = [True] * 39 + [False] + [True] * 39 + [False]
    assert steps_until_the_end(DivergenceWatch(3, tmp_path), [GOOD] * 80, finds) == (None, "")
    step, said = steps_until_the_end(DivergenceWatch(3, tmp_path), [GOOD] * 60, [False] * 5 + [True] * 55)
    assert step == 45
    assert "40 steps in a row (up to step 45)" in said
    assert "bf16: true" in said


def test_losses_end_a_run_at_the_limit_and_good_ones_begin_anew(tmp_path):
    losses = [NAN, NAN, GOOD, NAN, NAN, NAN]
    step, said = steps_until_the_end(DivergenceWatch(3, tmp_path), losses, [False] * 6)
    assert step == 6
    assert "since step 4 (3 steps)" in said


def test_the_last_adapter_is_looked_at_in_pieces_too(tmp_path, monkeypatch):
    """Under ZeRO-3 a parameter itself is empty, and its piece hangs on it."""
    parameter, piece = nn.Parameter(torch.empty(0)), torch.tensor([1.0, float("inf")])
    parameter.ds_tensor = piece
    monkeypatch.setattr(
        "llamafactory_adaptive.training.divergence.live_layers", lambda model: {"q": (None, "default")}
    )
    monkeypatch.setattr(
        "llamafactory_adaptive.training.divergence.factors", lambda layer, adapter: (parameter, parameter)
    )
    with pytest.raises(GuardError, match=r"holds NaN or infinity \(q, of 1 modules\); lower learning_rate"):
        DivergenceWatch(3, tmp_path).refuse_end(9, nn.Linear(1, 1))
    parameter.ds_tensor = torch.ones(2)
    DivergenceWatch(3, tmp_path).refuse_end(9, nn.Linear(1, 1))
