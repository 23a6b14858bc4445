"""Target modules of a tiny model, and what goes into them."""

import torch

from tests.helpers.tiny import TARGETS


def targets(model):
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS}


def captured_inputs(model, data):
    """Inputs of every target row by row, without padding: the slow, obvious way."""
    inputs = {name: [] for name in targets(model)}
    handles = [
        m.register_forward_pre_hook(lambda _, args, n=n: inputs[n].append(args[0][0].double().detach()))
        for n, m in targets(model).items()
    ]
    with torch.no_grad():
        for row in data:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in inputs.items()}
