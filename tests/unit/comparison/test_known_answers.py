"""Comparisons whose answer is known: one module alone is wrong, or nothing can be learned."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.experiment import Design, Progress
from llamafactory_adaptive.comparison.results import arm_results, judgements
from tests.helpers.tiny import tiny_model


WRONG = "model.layers.1.mlp.down_proj"  # the module in which the base differs from the source of the rows
OTHER = "model.layers.0.mlp.down_proj"
ROWS, TOKENS, STEPS = 64, 24, 60
# Ranks of equal cost: one everywhere in the MLPs, or all of it in one of its six modules.
MLPS = [f"model.layers.{layer}.mlp.{kind}_proj" for layer in (0, 1) for kind in ("gate", "up", "down")]
ARMS = {
    "lora": dict.fromkeys(MLPS, 1),
    "random": {OTHER: 4, "model.layers.0.mlp.up_proj": 2},
    "right": {WRONG: 6},
    "wrong": {OTHER: 6},
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    model = tiny_model()
    with torch.no_grad():  # answers that are nearly certain: what is not yet learned shows in the loss
        model.lm_head.weight.mul_(40.0)
    return model


@pytest.fixture(scope="module")
def answers(base):
    """Rows whose every next token is the likeliest under a source that differs from the base in one module."""
    source, generator = copy.deepcopy(base), torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = source.get_submodule(WRONG).weight
        rank_two = [torch.randn(2, size, generator=generator) for size in weight.shape]
        weight += 0.3 * rank_two[0].T @ rank_two[1]
        inputs = torch.randint(source.config.vocab_size, (3 * ROWS, TOKENS), generator=generator)
        return inputs, source(inputs).logits.argmax(-1)


def noise(inputs, labels):
    """Answers that no input tells anything about."""
    return inputs, torch.randint(1000, labels.shape, generator=torch.Generator().manual_seed(1)) % int(
        inputs.max() + 1
    )


def losses(model, inputs, labels):
    with torch.no_grad():
        logits = model(input_ids=inputs).logits
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.view(labels.shape).mean(1).tolist()


def trainer(base, inputs, labels):
    """Build the function that makes a run: plain LoRA of an arm's ranks on the first third of the rows."""

    def train(run):
        torch.manual_seed(run.seed)
        ranks = ARMS[run.arm]
        alphas = {name: 2 * rank for name, rank in ranks.items()}
        config = LoraConfig(r=6, lora_alpha=12, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas)
        model = get_peft_model(copy.deepcopy(base), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=run.point.rate)
        for _ in range(STEPS):
            chosen = torch.randint(ROWS, (16,))
            logits = model(input_ids=inputs[chosen]).logits
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        parts = {"dev": slice(ROWS, 2 * ROWS), "test": slice(2 * ROWS, 3 * ROWS)}
        return {"status": "done", **{half: losses(model, inputs[part], labels[part]) for half, part in parts.items()}}

    return train


def verdicts(train):
    known = {}
    progress = Progress(Design((3e-3, 1e-2, 3e-2), seeds=3, extensions=1), [Arm(name) for name in ARMS], known.get,
                        lambda outcome, half: float(np.mean(outcome[half])))  # fmt: skip
    while due := progress.due():
        known[due[0]] = train(due[0])
    found = judgements(arm_results(progress), [TOKENS] * ROWS, effect=0.01)["lora"]
    return {judgement.arm: judgement for judgement in found}


def test_where_one_module_alone_is_wrong_the_ranks_that_go_there_win(base, answers):
    found = verdicts(trainer(base, *answers))
    assert (found["right"].verdict, found["wrong"].verdict) == ("better", "worse")


def test_where_nothing_can_be_learned_no_arm_wins(base, answers):
    found = verdicts(trainer(base, *noise(*answers)))
    assert {judgement.verdict for judgement in found.values()} <= {"equivalent", "not decided"}
    relative = [judgement.difference.relative for judgement in found.values()]
    # A loss lower by 0.3 of plain LoRA's would be found.
    assert all(each.high - each.low < 0.6 for each in relative)
