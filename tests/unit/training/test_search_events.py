"""A whole search by events alone: what a Trainer would tell is told here, with gradients drawn at random."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError
from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.ranks.search_config import PruningConfig
from llamafactory_adaptive.reports.rank_history import read_rank_history
from llamafactory_adaptive.training.bound_run import RunRequest
from llamafactory_adaptive.training.callback import AdaptiveCallback
from llamafactory_adaptive.training.guard import PlanGuard
from llamafactory_adaptive.training.masked_search import SearchRequest
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.search_checkpoint import SearchCheckpoint
from tests.helpers.dynamic import start_plan
from tests.helpers.tiny import tiny_model


STEPS, LORA_RANK, START_RANK = 8, 2, 4
# Pruned between steps 0 and 4, every second step: allocations at 2 and 4.
SEARCH = PruningConfig(START_RANK, warmup_ratio=0.0, final_ratio=0.5, interval=2, max_overhead=None, seed=0)
CONFIG = AdaptiveConfig("igu", {"importance": "off"}, "params", LORA_RANK, 4.0, 1, 8, None,
                        CalibrationConfig(None, 0, 0, 0), SEARCH)  # fmt: skip


class Run:
    """Tells a search what a Trainer would."""

    def __init__(self, folder, search=SEARCH, options=CONFIG.options):
        base = tiny_model()
        self.plan = start_plan(base, START_RANK, LORA_RANK)
        self.model = get_peft_model(base, LoraConfig(**lora_config_arguments(self.plan), task_type="CAUSAL_LM"))
        self.args = SimpleNamespace(output_dir=str(folder), deepspeed=None, should_save=True, fp16=False,
                                    load_best_model_at_end=False, save_strategy="no", optim="adamw_torch",
                                    learning_rate=1e-4, gradient_accumulation_steps=2)  # fmt: skip
        self.state = SimpleNamespace(global_step=0, max_steps=STEPS, log_history=[{}], best_model_checkpoint=None)
        self.clipped = []
        accelerator = SimpleNamespace(clip_grad_norm_=lambda: self.clipped.append(self.state.global_step))
        self.guard = PlanGuard(self.plan, RunLog("igu", 0.0), is_final=False)
        config = replace(CONFIG, search=search, options=options)
        request = SearchRequest(self.plan, config, make_method("igu", options))
        self.callback = AdaptiveCallback(self.guard, RunRequest(3, request))
        handler = SimpleNamespace(callbacks=[self.callback])
        self.trainer = SimpleNamespace(model=self.model, args=self.args, accelerator=accelerator, optimizer=None,
                                       callback_handler=handler)  # fmt: skip
        self.callback.bind_trainer(self.trainer)
        self.trainer.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.generator = torch.Generator().manual_seed(0)

    def tell(self, event, **more):
        getattr(self.callback, f"on_{event}")(self.args, self.state, None, model=self.model, **more)

    def step(self):
        self.tell("step_begin")
        self.callback.see_loss(torch.tensor(1.0))
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=self.generator)
        self.trainer.accelerator.clip_grad_norm_()
        self.tell("pre_optimizer_step")
        self.state.global_step += 1
        self.tell("step_end")


def test_a_search_observes_allocates_and_settles_on_a_plan_within_budget(tmp_path):
    run = Run(tmp_path)
    run.tell("train_begin")
    observed, ranks = [], []
    for _ in range(STEPS):
        run.step()
        observed.append(run.guard.counters.observations)
        ranks.append(sum(run.callback.current_plan().ranks().values()))
    assert observed == [1, 2, 3, 4, 4, 4, 4, 4], "once a step, until ranks are final"
    assert run.clipped == list(range(STEPS)), "the step's own clipping still takes place"
    full = START_RANK * 14
    assert ranks[0] == full > ranks[1] > ranks[3]
    assert ranks[3:] == [ranks[3]] * 5
    assert (run.guard.counters.allocations, run.guard.counters.steps) == (2, STEPS)
    assert (run.guard.is_final, run.guard.plan) == (False, run.plan)

    run.tell("train_end")
    assert run.guard.is_final
    assert run.guard.plan == run.callback.current_plan() == run.callback.bound.search.triplets.compact
    budget = run.guard.plan.budget()
    assert 0 < budget["used_parameters"] <= budget["asked_parameters"]
    assert load_plan(tmp_path / PLAN_FILE).ranks() == run.guard.plan.ranks()
    told = told_by(tmp_path)
    assert [(line["step"], line["event"]) for line in told] == [(0, "begin"), (2, "allocation"), (4, "allocation")]
    assert all(line["probing_seconds"] == 0 for line in told)
    held = told[2]["memory"]["observing"]["host"] - 3 * 4 * full
    assert 0 < held <= 3 * 4 * 14, "of each component P, lambda and Q in fp32, and a count per block"
    assert told[2]["memory"]["allocating"]["host"] >= 0
    history = read_rank_history(tmp_path)
    assert (history.steps, len(told[0]["modules"])) == ((0, 2, 4), len(run.plan.modules))
    assert sum(told[0]["ranks"]) == full
    run.guard.verify_run()


def told_by(folder):
    return [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]


@pytest.mark.parametrize(("batches", "due"), [(8, [2, 4]), (5, [2, 4]), (4, [1, 2, 3, 4]), (99, [4])])
def test_a_share_of_an_epoch_is_counted_in_optimizer_steps_of_the_data_loader(tmp_path, caplog, batches, due):
    """Half an epoch: two micro-batches make a step, the last of an odd number makes one alone."""
    run = Run(tmp_path, replace(SEARCH, interval=None, interval_epochs=0.5))
    with caplog.at_level("INFO"):
        run.tell("train_begin", train_dataloader=range(batches))
    for _ in range(STEPS):
        run.step()
    begin, *allocations = told_by(tmp_path)
    assert [line["step"] for line in allocations] == due
    steps = {8: 2, 5: 2, 4: 1, 99: 25}[batches]
    assert begin["interval"] == steps
    words = "every step" if steps == 1 else f"every {steps} steps"
    assert f"{words} (0.5 of an epoch) between steps 0 and 4 of 8" in caplog.text


def test_a_share_of_an_epoch_needs_data_of_known_length(tmp_path):
    run = Run(tmp_path, replace(SEARCH, interval=None, interval_epochs=0.5))
    with pytest.raises(AdaptiveConfigError, match=r"adaptive_interval_epochs: 0.5 is invalid: .* no known length"):
        run.tell("train_begin", train_dataloader=iter(range(8)))


def test_figures_of_an_allocation_join_the_losses(tmp_path):
    run = Run(tmp_path)
    run.tell("train_begin")
    for figures, expected in (({"loss": 1.0}, False), ({"eval_loss": 1.0}, False)):
        run.callback.on_log(run.args, run.state, None, logs=figures)
        assert ("adaptive/mean_rank" in figures) is expected
    run.step()
    run.step()
    for figures, expected in (({"loss": 1.0}, True), ({"eval_loss": 1.0}, False)):
        run.callback.on_log(run.args, run.state, None, logs=figures)
        assert ("adaptive/mean_rank" in figures) is expected
    assert "adaptive/mean_rank" in run.state.log_history[-1]


@pytest.mark.parametrize(
    ("options", "rate", "step", "ratio", "told", "warned"),
    [
        ({"variant": "published"}, 1e-4, 0, 1.0, True, True),
        ({"variant": "published"}, 1e-3, 0, 1.0, True, False),
        ({"variant": "published"}, 1e-4, 3, 1.0, False, False),
        ({"variant": "published"}, 1e-4, 0, 16.0, False, False),  # LoRA+
        ({"variant": "corrected"}, 1e-4, 0, 1.0, False, False),
    ],
)
def test_the_start_tells_of_a_learning_rate_that_moves_the_adapter_less_than_plain_lora(
    options, rate, step, ratio, told, warned, tmp_path, caplog, monkeypatch
):
    run = Run(tmp_path, options=options)
    first, *others = (p for p in run.model.parameters() if p.requires_grad)
    groups = [{"params": [first], "lr": ratio * rate}, {"params": others, "lr": rate}]
    run.trainer.optimizer = torch.optim.SGD(groups)
    torch.optim.lr_scheduler.LinearLR(run.trainer.optimizer)  # its first rates are smaller
    run.args.learning_rate, run.state.global_step = rate, step
    monkeypatch.setattr(SearchCheckpoint, "resume", lambda *_: None)
    run.callback.resume_from(tmp_path)
    with caplog.at_level("INFO", logger="llamafactory.adaptive"):
        run.tell("train_begin")
    # 0.577 / (0.02 sqrt(32) sqrt(0.0204)) in the median module, of 32 inputs.
    words = (
        f"learning_rate {rate:g} moves each component of Delta W at first as plain LoRA does at {rate / 35.73:.2g}; "
    )
    assert (words in caplog.text) is told
    assert [text for text in run.guard.log.warnings if "learning_rate" in text] == (
        ["learning_rate 0.0001 is low for this method: each component of Delta W moves at first 36 times "
         "less than plain LoRA's; try learning_rate: 0.001"] if warned else []
    )  # fmt: skip


def test_nothing_is_chosen_that_was_not_observed(tmp_path):
    run = Run(tmp_path)
    run.trainer.accelerator.clip_grad_norm_ = lambda: None  # as if the hook had never fired
    run.tell("train_begin")
    run.step()
    with pytest.raises(GuardError, match="components are to be chosen at step 2, but none was observed"):
        run.step()


def test_nothing_is_chosen_on_losses_that_are_no_numbers(tmp_path):
    run = Run(tmp_path)
    run.tell("train_begin")
    run.step()
    run.callback.see_loss(torch.tensor(float("nan")))
    with pytest.raises(GuardError, match="choosing ranks at step 2 is not possible"):
        run.step()
