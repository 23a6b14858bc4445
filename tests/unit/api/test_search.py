"""A search by a Trainer of transformers: what it is given, what it refuses, and what it ends with."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainingArguments

from llamafactory_adaptive.errors import AdaptiveConfigError, GuardError, PlanError
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.dynamic import batch
from tests.helpers.searches import searching, trainer_of
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
