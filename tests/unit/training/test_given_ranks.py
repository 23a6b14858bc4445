"""Given ranks trained as P diag(lambda) Q: the first step by its definition, exact resumes, plain LoRA when saved."""

import json

import pytest
import torch
from peft import PeftModel
from torch.func import functional_call

from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.training.checkpoint import read_state
from tests.helpers.second_stage import SEED, factors, given_plan, second_stage
from tests.helpers.tiny import rows, tiny_model
from tests.helpers.training import logits


PUBLISHED = {"variant": "published"}
IDENTITY = {"variant": "published", "orthogonality": "identity", "orthogonality_weight": 3.0}


def drawn(plan, published):
    """The factors at the start: N(0, 0.02) and lambda 0.1 as published, those of LoRA and lambda 1 otherwise."""
    generator, start = torch.Generator().manual_seed(SEED), {}
    for module in plan.active:
        q, p = torch.empty(module.rank, module.in_features), torch.zeros(module.out_features, module.rank)
        if published:
            q.normal_(0.0, 0.02, generator=generator)
            p.normal_(0.0, 0.02, generator=generator)
        else:
            q.uniform_(-(module.in_features**-0.5), module.in_features**-0.5, generator=generator)
        start[module.name] = (torch.full((module.rank,), 0.1 if published else 1.0), p, q)
    return {name: [tensor.requires_grad_() for tensor in tensors] for name, tensors in start.items()}


def loss_of(plan, start, batch):
    """The loss of the base model with ``W + alpha/r P diag(lambda) Q`` in place of each W."""
    base = tiny_model()
    weights = {f"{name}.weight": base.get_submodule(name).weight.detach() + plan.scale * (p * lambda_r) @ q
               for name, (lambda_r, p, q) in start.items()}  # fmt: skip
    return functional_call(base, weights, (), dict(batch)).loss


def penalty_of(start, identity):
    """The mean over all P and Q of the norm of what counts of their Gram matrices."""
    grams = [gram for _, p, q in start.values() for gram in (p.T @ p, q @ q.T)]
    off = [gram - (torch.eye(len(gram)) if identity else torch.diag(gram.diagonal())) for gram in grams]
    return torch.stack([(part**2).sum().sqrt() for part in off]).mean()


@pytest.mark.parametrize(
    ("options", "weight"), [(PUBLISHED, 1.0), (IDENTITY, 3.0), ({}, 0.0)], ids=["published", "identity", "corrected"]
)
def test_the_first_step_follows_loss_and_regulariser_from_the_drawn_factors(options, weight, tmp_path):
    """One step of gradient descent at rate 1 without clipping: the factors move by exactly the gradient."""
    more = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    trainer = second_stage(tmp_path, options=options, max_steps=1, per_device_train_batch_size=12, **more)
    trainer.train()
    plan = given_plan()
    start = drawn(plan, published=bool(options))
    objective = loss_of(plan, start, trainer.data_collator(rows(12)))
    if weight:
        objective = objective + weight * penalty_of(start, identity=options is IDENTITY)
    objective.backward()
    found = factors(trainer)
    assert len(found) == 3 * len(plan.active)
    for name, tensors in start.items():
        for kind, tensor in zip(("lambda", "P", "Q"), tensors, strict=True):
            expected = tensor.detach() - tensor.grad
            assert torch.allclose(found[f"{kind}.{name}"], expected, rtol=1e-4, atol=1e-6), f"{kind} of {name}"
    assert any(bool((tensors[1].grad != 0).any()) for tensors in start.values())


def test_the_start_tells_of_a_learning_rate_that_is_low_for_the_form(tmp_path):
    trainer = second_stage(tmp_path, options=PUBLISHED, max_steps=1, learning_rate=1e-4)
    trainer.train()
    (warning,) = trainer.adaptive_callback.guard.log.warnings
    assert warning.startswith(
        "learning_rate 0.0001 is low for this method: each component of Delta W moves at first 36 times less"
    )


@pytest.mark.parametrize("options", [PUBLISHED, {}], ids=["published", "corrected"])
def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path):
    whole = second_stage(tmp_path / "whole", options=options, save_strategy="steps", save_steps=3)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = second_stage(tmp_path / "again", checkpoint, options)
    again.train(resume_from_checkpoint=str(checkpoint))
    found, expected = factors(again), factors(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    stored, _ = read_state(checkpoint, partitioned=False)
    assert any(not torch.equal(stored[key], expected[key]) for key in expected), "it trained after the checkpoint"
    assert again.adaptive_callback.guard.counters.steps == 6


def test_what_is_saved_is_plain_lora_of_the_given_ranks_and_equals_the_live_model(tmp_path):
    trainer = second_stage(tmp_path, options=PUBLISHED)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    guard, plan = trainer.adaptive_callback.guard, given_plan()
    guard.verify_saved(tmp_path / "adapter")
    assert (guard.counters.allocations, guard.counters.observations, guard.counters.steps) == (0, 0, 6)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {module.name: module.rank for module in plan.active}
    live, plain = (logits(m) for m in (trainer.model, PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")))
    assert (live - plain).abs().max() <= 1e-5
    assert (live - logits(tiny_model())).abs().max() > 1e-3, "the adapter should do something"
    assert load_plan(tmp_path / PLAN_FILE).ranks() == plan.ranks(), "the module without an adapter included"
    (line,) = (json.loads(text) for text in (tmp_path / LOG_FILE).read_text().splitlines())
    assert (line["step"], line["ranks_changed"]) == (0, len(plan.active))


def test_the_best_checkpoint_is_restored_with_its_own_factors(tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = second_stage(tmp_path, options=PUBLISHED, **every, **best)
    trainer.train()
    chosen = tmp_path / trainer.state.best_model_checkpoint.rpartition("/")[2]
    assert chosen.name != "checkpoint-6", "the highest loss is not the last"
    stored, _ = read_state(chosen, partitioned=False)
    assert all(torch.equal(stored[key], value) for key, value in factors(trainer).items())
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.adaptive_callback.guard.verify_saved(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert (logits(trainer.model) - logits(plain)).abs().max() <= 1e-5
