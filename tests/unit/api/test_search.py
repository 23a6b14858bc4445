"""A search by a Trainer of transformers: what it is given, what it refuses, and what it ends with."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from llamafactory_adaptive import rank_search
from llamafactory_adaptive.api import search as search_module
from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError, PlanError
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.dynamic import batch
from tests.helpers.searches import given_to, searching, trainer_of
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A search that ended, and the folder its adapter was saved to; checkpoints every second step."""
    folder, search = tmp_path_factory.mktemp("ended"), searching()
    trainer = trainer_of(search, folder, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(folder))
    return search, search.finalize(folder), folder


def problems(work):
    with pytest.raises(AdaptiveConfigError) as caught:
        work()
    return {problem.key: problem.suggestion for problem in caught.value.problems}


def test_it_ends_within_the_budget_with_the_adapter_that_was_saved(ended):
    search, plan, folder = ended
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.budget()["used_parameters"]
    assert 0 <= plan.budget()["left_parameters"] < max(module.parameters_per_rank for module in plan.modules)
    assert load_plan(folder / PLAN_FILE).ranks() == plan.ranks() == search.plan.ranks()
    assert len(set(plan.ranks().values())) > 1
    with torch.no_grad():
        live = search.model.eval()(**batch()).logits
        plain = PeftModel.from_pretrained(tiny_model(), folder)(**batch()).logits
    assert torch.allclose(plain, live, atol=1e-5)


def test_its_log_has_an_allocation_at_every_interval_under_a_budget_that_falls(ended):
    lines = [json.loads(line) for line in (ended[2] / "adaptive_log.jsonl").read_text().splitlines()]
    allocations = [line for line in lines if line["event"] == "allocation"]
    assert [line["step"] for line in allocations] == [2, 4]
    asked = [line["budget_asked"] for line in allocations]
    assert asked == sorted(asked, reverse=True)
    assert all(line["budget_used"] <= line["budget_asked"] for line in allocations)


def test_a_search_that_goes_on_from_a_checkpoint_finds_the_same(ended, tmp_path):
    _, plan, folder = ended
    search = searching()
    trainer = trainer_of(search, tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    trainer.save_model(str(tmp_path))
    assert search.finalize(tmp_path).ranks() == plan.ranks()
    first, second = (load_file(saved / "adapter_model.safetensors") for saved in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_share_of_an_epoch_is_the_trainers_steps_and_the_same_ones_on_resume(tmp_path):
    by_epochs = {"interval": None, "interval_epochs": 1 / 3}  # an epoch is twelve rows
    trainer_of(searching(**by_epochs), tmp_path, save_strategy="steps", save_steps=2).train()
    begin, *allocations = [json.loads(line) for line in (tmp_path / "adaptive_log.jsonl").read_text().splitlines()]
    assert (begin["interval"], [line["step"] for line in allocations]) == (2, [2, 4])
    again = trainer_of(searching(**by_epochs), tmp_path / "again", per_device_train_batch_size=1)
    with pytest.raises(PlanError, match=r"every 2 steps and this one does every 4: interval_epochs is a share"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_search_or_a_damaged_one_is_refused(ended, tmp_path):
    checkpoint = ended[2] / "checkpoint-2"
    other = trainer_of(searching(max_rank=6), tmp_path)
    with pytest.raises(PlanError, match="another run: max_rank is 8 there and 6 here"):
        other.train(resume_from_checkpoint=str(checkpoint))
    damaged = tmp_path / "checkpoint-2"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PlanError, match=r"checkpoint-2 cannot be resumed from: .* has changed since it was written"):
        trainer_of(searching(), tmp_path).train(resume_from_checkpoint=True)


def test_until_it_trains_its_plan_is_where_it_starts_and_nothing_can_be_finalized(tmp_path):
    search = searching(init_rank=6)
    assert set(search.plan.ranks().values()) == {6}
    with pytest.raises(GuardError, match="the search has not ended"):
        search.finalize(tmp_path)


def test_another_model_and_a_second_trainer_are_refused(tmp_path):
    search, other = searching(), searching()
    assert problems(lambda: trainer_of(search, tmp_path, model=other.model)) == {"model": "model=search.model"}
    trainer_of(search, tmp_path)
    assert problems(lambda: trainer_of(search, tmp_path)) == {"trainer": "rank_search anew"}


def test_copies_of_the_model_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert list(problems(lambda: trainer_of(searching(), tmp_path))) == ["n_gpu"]


# -- optimizers and losses of a user's own ---------------------------------------------------------------------------


def reallocating():
    return rank_search(tiny_model(), method="tsq", lora_rank=2, sampling=False)


def train_with(search, folder, **given):
    trainer = search.trainer(Trainer)(**given_to(search, folder, max_steps=4), **given)
    trainer.train()
    return trainer


def test_an_optimizer_made_before_the_search_has_all_its_parameters_is_refused_before_training(tmp_path):
    search = searching()
    made = torch.optim.AdamW(search.model.parameters(), lr=1e-2)
    with pytest.raises(AdaptiveConfigError) as caught:
        train_with(search, tmp_path, optimizers=(made, None))
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("optimizers", "AdamW")
    assert problem.allowed.startswith("it does not train 14 of the adapter's 42 parameters"), "lambda of every module"
    assert search.callback.guard.counters.steps == 0


def test_an_optimizer_that_the_trainer_makes_of_a_given_class_trains_the_search(tmp_path):
    search = searching()
    train_with(search, tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    assert search.callback.guard.is_final


def test_tsq_takes_optimizers_whose_states_it_can_set_anew_and_refuses_others(tmp_path):
    search = reallocating()
    made = torch.optim.AdamW(search.model.parameters(), lr=1e-2)
    trainer = train_with(search, tmp_path, optimizers=(made, None))
    assert trainer.optimizer.optimizer is made
    assert search.callback.guard.counters.allocations > 1
    other = reallocating()
    with pytest.raises(AdaptiveConfigError, match=r"optim: 'Rprop' is invalid: .*; try optim='adamw_torch'"):
        train_with(other, tmp_path, optimizer_cls_and_kwargs=(torch.optim.Rprop, {"lr": 0.1}))
    assert other.callback.guard.counters.steps == 0


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return 2 * super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("trainer_class", "given", "key", "value"),
    [(OwnLoss, {}, "compute_loss", "OwnLoss"),
     (Trainer, {"compute_loss_func": sum}, "compute_loss_func", "sum"),
     (Seq2SeqTrainer, {}, None, None)],
)  # fmt: skip
def test_extra_passes_refuse_a_loss_that_is_not_the_models(trainer_class, given, key, value, tmp_path):
    def make(importance):
        search = searching(importance=importance)
        arguments = given_to(search, tmp_path)
        if trainer_class is Seq2SeqTrainer:
            arguments["args"] = Seq2SeqTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        return search.trainer(trainer_class)(**arguments, **given)

    make("shrink")
    if key is None:
        make("integrated")
        return
    with pytest.raises(AdaptiveConfigError) as caught:
        make("integrated")
    (problem,) = caught.value.problems
    assert (problem.key, problem.value, problem.suggestion) == (key, value, "importance='shrink'")


def test_the_loss_of_trls_sft_trainer_is_the_models():
    """Without importing it, which takes seconds: the module that defines its loss is one that is let pass."""
    pytest.importorskip("trl")
    (name,) = [name for name in search_module._ON_MODEL_LOSS if name.startswith("trl.")]
    source = Path(find_spec(name).origin).read_text(encoding="utf-8")
    assert "class SFTTrainer" in source
    assert "def compute_loss(" in source


@pytest.mark.parametrize(
    ("variables", "keys"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ["deepspeed"]),
        ({}, []),
        ({"ACCELERATE_USE_FSDP": "True"}, ["fsdp_version", "fsdp"]),
    ],
)
def test_what_accelerate_launch_asks_for_counts_as_the_arguments_do(variables, keys, tmp_path, monkeypatch):
    search = searching(importance="integrated")
    trainer = Trainer(**given_to(search, tmp_path))  # built without the launcher, which would start DeepSpeed
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    assert list(problems(lambda: search._admit(trainer))) == keys if keys else search._admit(trainer) is None
