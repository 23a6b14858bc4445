"""What a run whose factors start from data tells of its learning rate."""

import logging
from types import SimpleNamespace

from torch import nn

from llamafactory_adaptive.training.bound_run import BoundRun, RunRequest
from llamafactory_adaptive.training.rate_advice import RateAdvice
from llamafactory_adaptive.training.run_log import RunLog


def advice_of(start):
    """What a run on fixed ranks tells of its rate."""
    log, plan = RunLog("uniform", 0.0), SimpleNamespace(scale=2.0, method="uniform")
    arguments = SimpleNamespace(
        deepspeed=None, output_dir="unused", learning_rate=1e-4, optim="adamw_torch", should_save=True, device="cpu"
    )
    trainer = SimpleNamespace(
        model=nn.Module(), args=arguments, optimizer=SimpleNamespace(param_groups=[{"lr": 1e-4}])
    )
    run = BoundRun(RunRequest(3, start=start), SimpleNamespace(plan=plan, log=log), trainer, lambda: None)
    state = SimpleNamespace(global_step=0, max_steps=10)
    for advice in (part for part in run._fixed_ranks(state, None, None) if isinstance(part, RateAdvice)):
        advice.announce(arguments, state)
    return log.warnings


def test_a_start_that_moves_more_than_lora_is_told_and_loras_own_is_not(caplog):
    start = SimpleNamespace(kind="eva", copy_into=lambda model, scale, device: [0.5, 0.58, 0.6])
    with caplog.at_level(logging.INFO, "llamafactory.adaptive"):
        assert advice_of(start) == []
        assert (
            "(uniform): learning_rate 0.0001 moves each component of Delta W at first as plain LoRA does at 0.00017"
            in (caplog.text)
        )
        caplog.clear()
        assert advice_of(None) == []
    assert "learning_rate" not in caplog.text
