"""What a search holds in memory beside the adapter: bytes per trainable element, for Llama-3-8B at rank 16.

Run: ``python benchmarks/memory.py [--rank 16]``.

Adapter, statistics and the weights of a pass are those of the package's own code, on the meta device, where tensors
have shapes and types but no values; one step is observed, with all components beyond the budget masked. AdamW's two
fp32 numbers per element are arithmetic. Left out are activations, and what scoring holds for a moment after they are
gone: one block of gradients and weights after the other. Shares are of AdamW's state for plain LoRA of the same live
rank, which is larger than that of the budget.
"""

import argparse
import math
from typing import Any

import record
import torch
from torch import nn

from llamafactory_adaptive import attach_adapter
from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.training.components import Components


LAYERS, WIDTH, NARROW, MLP = 32, 4096, 1024, 14336  # of Llama-3-8B
SHAPES = {"q_proj": (WIDTH, WIDTH), "k_proj": (WIDTH, NARROW), "v_proj": (WIDTH, NARROW), "o_proj": (WIDTH, WIDTH),
          "gate_proj": (WIDTH, MLP), "up_proj": (WIDTH, MLP), "down_proj": (MLP, WIDTH)}  # fmt: skip
ADAM = 8  # two fp32 numbers per element
# Method, its options, and the rank that trains over that of the budget, as the defaults have it.
ROWS: dict[str, tuple[str, dict[str, Any], float]] = {
    "igu": ("igu", {}, 2.0),
    "igu, product": ("igu", {"uncertainty": "product"}, 2.0),
    "igu, published": ("igu", {"variant": "published"}, 2.0),
    "adalora": ("adalora", {}, 2.0),
    "adalora, bfloat16": ("adalora", {"statistics_dtype": "bfloat16"}, 2.0),
    "svd": ("svd", {}, 2.0),
    "elalora": ("elalora", {}, 2.0),
    "tsq, steps": ("tsq", {"sensitivity_over": "step"}, 4.0),
    "tsq": ("tsq", {}, 4.0),
}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in SHAPES.items()})
            for _ in range(LAYERS)
        )


def measured(method_name: str, options: dict[str, Any], rank: int, budget: int) -> dict[str, float]:
    """Bytes per trainable element of one method's search, at its start."""
    method = make_method(method_name, options)
    with torch.device("meta"):
        base = Base()
        modules = (ModulePlan(f"layers.{layer}.{name}", *shape, rank=rank)
                   for layer in range(LAYERS) for name, shape in SHAPES.items())  # fmt: skip
        plan = RankPlan(method_name, {}, "params", rank, 2.0 * budget, tuple(modules))
        model = attach_adapter(base, plan, "FEATURE_EXTRACTION")
        start = method.initial_adapter
        triplets = Triplets(model, plan, start.lambda_value, start.factors, seed=0)
        triplets.share_weights(model)
    components = Components(triplets, UnpartitionedEngine())
    components.arrival.done = True  # what has no values arrives nowhere
    assert triplets.effective is not None
    triplets.mask([[True] * budget + [False] * (rank - budget)] * len(triplets.modules))
    triplets.effective.prepare()
    copies = sum(slot.weight.nbytes for group in triplets.effective.groups
                 for slot, layer in zip(group.slots, group.layers, strict=True)
                 if slot.weight is not None and slot.weight is not layer.weight)  # fmt: skip
    for parameter in components.parameters:
        parameter.grad = torch.zeros_like(parameter)
    if not method.traits.spectral:
        components.update(method, None)
    elements = sum(parameter.numel() for parameter in components.parameters)
    held = sum(value.nbytes for value in method.state().values())
    moments = 4.0 if method.traits.sample_moment else 0.0
    return {
        "live_rank": rank,
        "elements": elements,
        "weights": sum(parameter.nbytes for parameter in components.parameters) / elements,
        "gradients": sum(parameter.nbytes for parameter in components.parameters) / elements,
        "adam": float(ADAM),
        "statistics": held / elements,
        "sums_over_samples": moments,
        "weights_of_a_pass": copies / elements,
        "statistics_over_adam": held / elements / ADAM,
        "extra_over_adam": (held / elements + moments + copies / elements) / ADAM,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    rows = {}
    for name, (method, given, ratio) in ROWS.items():
        rows[name] = measured(method, given, math.ceil(options.rank * ratio), options.rank)
        print(name, {key: round(value, 3) for key, value in rows[name].items()}, flush=True)
    path = record.write_result("memory", {"model": "Llama-3-8B", "rank": options.rank, "bytes_per_element": rows})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
