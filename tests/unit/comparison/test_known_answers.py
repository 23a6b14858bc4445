"""Comparisons whose answer is known: one layer alone can help, or nothing can be learned."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llamafactory_adaptive import calibration_batches, plan_ranks, score_modules
from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.experiment import Design, Progress
from llamafactory_adaptive.comparison.results import arm_results, judgements
from tests.helpers.tiny import tiny_model


HELPS, VOID = ([f"model.layers.{layer}.mlp.{kind}_proj" for kind in ("gate", "up", "down")] for layer in (1, 0))
ROWS, TOKENS, STEPS = 64, 24, 60
EFFECT = 0.01
# Ranks of equal cost: one everywhere in the MLPs, or the same with those that have no effect elsewhere, or all there.
ARMS = {
    "lora": dict.fromkeys(HELPS + VOID, 1),
    "random": {**dict.fromkeys(HELPS, 1), VOID[0]: 3},
    "wrong": {VOID[2]: 6},
}


def base_of(sharpness):
    """A base whose first MLP reads zeros: whatever is trained there has no effect."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
        model.model.layers[0].post_attention_layernorm.weight.zero_()
    return model


@pytest.fixture(scope="module")
def helped_by_one_layer():
    """Rows whose every next token is the likeliest under a source that differs from the base in one layer, by rank 2.

    Answers are nearly certain, so that what is not yet learned shows in the loss.
    """
    base, generator = base_of(40.0), torch.Generator().manual_seed(0)
    source = copy.deepcopy(base)
    with torch.no_grad():
        for name in HELPS:
            weight = source.get_submodule(name).weight
            rank_two = [torch.randn(2, size, generator=generator) for size in weight.shape]
            weight += 0.3 * rank_two[0].T @ rank_two[1]
        inputs = torch.randint(source.config.vocab_size, (3 * ROWS, TOKENS), generator=generator)
        return base, inputs, source(inputs).logits.argmax(-1)


@pytest.fixture(scope="module")
def helped_by_nothing():
    """Rows drawn from the base itself, which no training makes likelier."""
    base, generator = base_of(10.0), torch.Generator().manual_seed(2)
    inputs = torch.randint(base.config.vocab_size, (3 * ROWS, TOKENS), generator=generator)
    with torch.no_grad():
        shares = base(inputs).logits.softmax(-1)
    return base, inputs, torch.multinomial(shares.flatten(0, 1), 1, generator=generator).view(inputs.shape)


def ranks_by(method, base, inputs, labels):
    """What a registered method plans from the rows that are trained on, at the cost of ``lora``."""
    rows = [{"input_ids": [*row.tolist(), 0], "labels": [-100, *answers.tolist()]}
            for row, answers in zip(inputs[:ROWS], labels[:ROWS], strict=True)]  # fmt: skip
    scores = score_modules(base, calibration_batches(rows, 8), method, target_modules=HELPS + VOID)
    return {name: rank for name, rank in plan_ranks(scores, lora_rank=1, min_rank=0).ranks().items() if rank}


def losses(model, inputs, labels):
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.view(labels.shape).mean(1).tolist()


def trainer(base, inputs, labels, arms):
    """Build the function that makes a run: plain LoRA of an arm's ranks on the first third of the rows."""

    def train(run):
        torch.manual_seed(run.seed)
        ranks = arms[run.arm]
        alphas = {name: 2 * rank for name, rank in ranks.items()}
        config = LoraConfig(r=6, lora_alpha=12, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas)
        model = get_peft_model(copy.deepcopy(base), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.point.rate)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = run.point.rate * (1.0 - step / STEPS)
            chosen = torch.randint(ROWS, (16,))
            logits = model(input_ids=inputs[chosen]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        parts = {"dev": slice(ROWS, 2 * ROWS), "test": slice(2 * ROWS, 3 * ROWS)}
        return {"status": "done", **{half: losses(model, inputs[part], labels[part]) for half, part in parts.items()}}

    return train


def verdicts(base, inputs, labels):
    arms, known = {**ARMS, "fisher": ranks_by("fisher", base, inputs, labels)}, {}
    train = trainer(base, inputs, labels, arms)
    design = Design((3e-3, 1e-2, 3e-2), seeds=4, rate_seeds=3, extensions=1)
    progress = Progress(
        design, [Arm(name) for name in arms], known.get, lambda outcome, half: float(np.mean(outcome[half]))
    )
    while due := progress.due():
        known[due[0]] = train(due[0])
    found = judgements(arm_results(progress), {half: [TOKENS] * ROWS for half in ("dev", "test")}, effect=EFFECT)[
        "lora"
    ]
    return {judgement.arm: judgement for judgement in found}


@pytest.mark.parametrize("method", ["fisher", "gora_ranks"])
def test_methods_that_read_gradients_find_the_layer_that_helps(method, helped_by_one_layer):
    assert ranks_by(method, *helped_by_one_layer) == dict.fromkeys(HELPS, 2)


def test_where_one_layer_alone_helps_the_method_that_finds_it_wins(helped_by_one_layer):
    found = verdicts(*helped_by_one_layer)
    assert (found["fisher"].verdict, found["wrong"].verdict) == ("better", "worse")


def test_where_nothing_can_be_learned_all_arms_are_equivalent(helped_by_nothing):
    found = verdicts(*helped_by_nothing)
    assert {name: judgement.verdict for name, judgement in found.items()} == dict.fromkeys(
        ("random", "wrong", "fisher"), "equivalent"
    )
    relative = [judgement.difference.relative for judgement in found.values()]
    assert all(each.high - each.low < EFFECT for each in relative), (
        "a difference as large as the effect would be found"
    )
