"""What the tests of dynamic methods share: a tiny PEFT model with triplets in it, as a run would have it."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.training.components import Components
from tests.helpers.tiny import TARGETS, rows, tiny_model


def start_plan(model, rank: int = 4, lora_rank: int = 2) -> RankPlan:
    modules = tuple(
        ModulePlan(name, module.in_features, module.out_features, rank=rank)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
    )
    return RankPlan("igu", {}, "params", lora_rank, 2.0 * lora_rank, modules)


def triplet_model(
    architecture: str = "llama",
    rank: int = 4,
    initial_lambda: float | None = 0.1,
    initial_factors: str | None = None,
    **sizes: Any,
):
    """A PEFT model, its triplets and their components; without lambda they start as LoRA does."""
    factors = initial_factors or ("lora" if initial_lambda is None else "gaussian")
    base = tiny_model(architecture, **sizes)
    plan = start_plan(base, rank)
    model = get_peft_model(base, LoraConfig(**lora_config_arguments(plan), task_type="CAUSAL_LM"))
    triplets = Triplets(model, plan, initial_lambda, factors, seed=1)
    return model, triplets, Components(triplets, UnpartitionedEngine())


def scatter(triplets: Triplets, seed: int = 0, std: float = 0.3) -> None:
    """Larger random factors than at the start, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in triplets.modules:
        for parameter in module.parameters().values():
            parameter.data.copy_(std * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def batch(seed=0):
    one = make_batches(rows(3, seed), 3, 0)[0]
    return {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": one.labels}


def stream(triplets, steps, seed=0):
    """Random weights and gradients, step by step, put where training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for module in triplets.modules:
            for parameter in module.parameters().values():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        yield
