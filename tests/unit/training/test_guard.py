"""The guard against runs that train, save or push something else than their plan; oracles are PEFT's own adapters."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import Trainer

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.training.gradient_check import GradientCheck
from llamafactory_adaptive.training.guard import PlanGuard, epoch_steps, uses_deepspeed
from llamafactory_adaptive.training.run_log import Counters, RunLog
from tests.helpers.dynamic import start_plan
from tests.helpers.tiny import tiny_model


ARGS = SimpleNamespace(deepspeed=None)
MODULES = 14


@pytest.fixture
def adapted():
    """A PEFT model and its plan."""
    base = tiny_model()
    plan = start_plan(base)
    return get_peft_model(base, LoraConfig(**lora_config_arguments(plan), task_type="CAUSAL_LM")), plan


def guard_of(plan, **more):
    return PlanGuard(plan, RunLog("igu", 1.0), **more)


def factors_of(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def other_ranks(plan):
    first, *rest = plan.modules
    return replace(plan, modules=(replace(first, rank=first.rank - 1), *rest))


# -- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4, 100])
def test_steps_of_an_epoch_are_the_trainers_own_and_the_same_on_all_processes(processes, accumulation):
    args = SimpleNamespace(gradient_accumulation_steps=accumulation, max_steps=-1, num_train_epochs=1.0)
    trainer = SimpleNamespace(get_total_train_batch_size=lambda args: 1, get_sp_size=lambda: 1, num_examples=len)
    loaders = [prepare_data_loader(DataLoader(range(53), batch_size=4), num_processes=processes, process_index=i,
                                   put_on_device=False) for i in range(processes)]  # fmt: skip
    asked = {Trainer.set_initial_training_values(trainer, args, loader)[1] for loader in loaders}
    assert {epoch_steps(loader, args) for loader in loaders} == asked
    assert len(asked) == 1


def test_a_stream_has_no_steps_of_an_epoch():
    assert epoch_steps(iter(range(8)), SimpleNamespace(gradient_accumulation_steps=1)) is None
    assert epoch_steps(None, ARGS) is None


# -- the live model --------------------------------------------------------------------------------------------------


def test_the_planned_adapter_passes_and_its_modules_are_counted(adapted):
    model, plan = adapted
    guard = guard_of(plan)
    guard.verify_live(model, watches_gradients=False)
    assert (guard.counters.modules_checked, guard.watches_gradients) == (MODULES, False)


def test_an_adapter_of_other_ranks_does_not(adapted):
    model, plan = adapted
    with pytest.raises(GuardError, match=r"q_proj has A \(4, 32\) and B \(32, 4\) for rank 3"):
        guard_of(other_ranks(plan)).verify_live(model)


@pytest.mark.parametrize(
    ("setting", "variable", "expected"),
    [(None, None, False), ("z.json", None, True), (None, "true", True), (None, "false", False)],
)
def test_deepspeed_is_known_by_setting_and_by_launcher(monkeypatch, setting, variable, expected):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    if variable:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", variable)
    assert uses_deepspeed(SimpleNamespace(deepspeed=setting)) is expected


# -- steps -----------------------------------------------------------------------------------------------------------


def test_the_first_step_needs_a_gradient_at_every_factor(adapted):
    model, _ = adapted
    every = list(factors_of(model).values())
    for factor in every:
        factor.grad = torch.zeros_like(factor)
    check = GradientCheck(Counters(), model)
    check.before_step(model)
    assert check.counters.gradients_missing == 0
    for factor in every[:3]:
        factor.grad = None
    check.before_step(model)  # a later step
    check = GradientCheck(Counters(), model)
    with pytest.raises(GuardError, match=r"without a gradient at the first step: .*gradients_missing=3"):
        check.before_step(model)


def test_a_module_that_the_first_batch_does_not_reach_is_checked_when_one_does(adapted):
    model, _ = adapted
    for factor in factors_of(model).values():
        factor.grad = torch.zeros_like(factor)
    check = GradientCheck(Counters(), model)
    name = next(iter(check.waiting))
    for factor in check.waiting[name]:
        factor.grad = None
    check.ran.names.update(set(check.waiting) - {name})
    check.before_step(model)
    assert list(check.waiting) == [name]
    check.ran.names.add(name)
    with pytest.raises(GuardError, match=rf"gradients_missing=2.*; of {name}"):
        check.before_step(model)


def test_steps_are_counted_and_the_largest_learning_rate_kept(adapted):
    model, plan = adapted
    guard = guard_of(plan)
    for rates in ([0.0, 1e-3], [2e-3, 0.0], [1e-4, 0.0]):
        guard.begin_step(None, SimpleNamespace(get_last_lr=lambda rates=rates: rates))
        guard.after_step(ARGS, None, model, None)
    guard.begin_step(None, None)  # no scheduler
    assert (guard.counters.steps, guard.counters.largest_learning_rate) == (3, 2e-3)


# -- what is saved and pushed ----------------------------------------------------------------------------------------


def saved(model, folder, moved):
    """Save the adapter with B of the first ``moved`` modules off zero."""
    bs = [p for name, p in factors_of(model).items() if ".lora_B." in name]
    assert len(bs) == MODULES
    for b in bs[:moved]:
        b.data.fill_(0.5)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")


def ended(plan, rate=1e-3, watches_gradients=True):
    guard = guard_of(plan)
    guard.counters.modules_checked, guard.counters.largest_learning_rate = MODULES, rate
    guard.watches_gradients = watches_gradients
    return guard


def test_a_trained_adapter_passes_and_completes_the_card(adapted, tmp_path):
    model, plan = adapted
    saved(model, tmp_path, MODULES)
    guard = ended(plan)
    guard.verify_saved(tmp_path)
    assert guard.log.warnings == []
    assert "igu" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("moved", "rate", "watched", "refused"),
    [(0, 1e-3, True, True), (0, 0.0, True, False), (13, 1e-3, True, False), (13, 1e-3, False, True),
     (13, 0.0, False, False)],
)  # fmt: skip
def test_untrained_modules_are_refused_or_warned_of(adapted, tmp_path, moved, rate, watched, refused):
    model, plan = adapted
    saved(model, tmp_path, moved)
    guard, untrained = ended(plan, rate, watched), MODULES - moved
    if refused:
        with pytest.raises(GuardError, match=f"{untrained} modules were saved untrained"):
            guard.verify_saved(tmp_path)
    else:
        guard.verify_saved(tmp_path)
        assert guard.log.warnings == [f"{untrained} of 14 modules were saved untrained: B is still zero"]


@pytest.mark.parametrize(
    ("counters", "said"),
    [({"modules_checked": 0}, "no allocation reached the model"),
     ({"modules_checked": 1, "observations": 2, "allocations": 2}, "igu but its search has not ended")],
)  # fmt: skip
def test_a_run_that_searched_for_nothing_is_refused(adapted, counters, said):
    _, plan = adapted
    guard = guard_of(plan, is_final=False)
    vars(guard.counters).update(counters)
    with pytest.raises(GuardError, match=said):
        guard.verify_run()
    vars(guard.counters).update(modules_checked=1, allocations=1, observations=1)
    guard.settle(plan)
    guard.verify_run()


@pytest.mark.parametrize("count", ["observations", "allocations"])
def test_ranks_that_nobody_observed_or_chose_are_not_taken(adapted, count):
    _, plan = adapted
    guard = guard_of(plan, is_final=False)
    vars(guard.counters).update({"observations": 2, "allocations": 2} | {count: 0})
    with pytest.raises(GuardError, match=f"igu but no component was chosen: .*{count}=0"):
        guard.settle(plan)
    assert not guard.is_final


def test_a_fixed_run_needs_no_observation(adapted):
    _, plan = adapted
    ended(plan).verify_run()


def test_only_final_ranks_are_held_against_what_is_pushed(adapted, tmp_path):
    model, plan = adapted
    guard_of(plan).verify_push(tmp_path)  # nothing lies there yet
    saved(model, tmp_path, MODULES)
    guard = guard_of(plan, is_final=False)
    guard.verify_push(tmp_path)
    vars(guard.counters).update(allocations=1, observations=1)
    guard.settle(other_ranks(plan))
    assert guard.is_final
    with pytest.raises(GuardError, match="rank_pattern gives"):
        guard.verify_push(tmp_path)
