"""What the tests of sample qualities share: adapted tiny models, batches, and the obvious way to their terms."""

import copy

import peft
import torch

from llamafactory_adaptive.adapter.lora import live_layers, lora_config_arguments
from llamafactory_adaptive.calibration.batches import length_sorted, make_batches
from llamafactory_adaptive.sampling.sample_gradients import TermSpec
from tests.helpers.dynamic import start_plan
from tests.helpers.tiny import rows, tiny_model


STEP = 0.01
DATA = rows(9)
PLAIN = TermSpec(STEP, False, "none", 64, 0)
EXACT = TermSpec(STEP, True, "exact", 64, 0)


def adapted(architecture="llama", trained=True, **sizes):
    """A tiny model with a LoRA adapter whose B is not zero."""
    base = tiny_model(architecture, **sizes)
    config = peft.LoraConfig(**lora_config_arguments(start_plan(base)), task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and trained:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model


def layers(model):
    return {name: (layer.lora_A[a], layer.lora_B[a]) for name, (layer, a) in live_layers(model).items()}


def inputs(data, pad_id=0):
    (one,) = make_batches(data, len(data), pad_id)
    return {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": one.labels}


def batches(data, size, pad_id=0):
    groups = length_sorted([len(row["input_ids"]) for row in data], size)
    return [(group, inputs([data[index] for index in group], pad_id)) for group in groups]


def one_by_one(model, data):
    """Loss, gradient (flat, fp64), loss after a step on the sample: one backward pass each, the obvious way."""
    trained = [p for p in model.parameters() if p.requires_grad]
    measured = []
    for row in data:
        model.zero_grad()
        loss = model(**inputs([row])).loss
        loss.backward()
        gradients = [p.grad.clone() for p in trained]
        stepped = copy.deepcopy(model)
        for p, g in zip((p for p in stepped.parameters() if p.requires_grad), gradients, strict=True):
            p.data.sub_(STEP * g)
        with torch.no_grad():
            after = stepped(**inputs([row])).loss
        measured.append((float(loss.detach()), torch.cat([g.flatten() for g in gradients]).double(), float(after)))
    model.zero_grad()
    losses, flat, afters = zip(*measured, strict=True)
    return torch.tensor(losses).double(), torch.stack(flat), torch.tensor(afters).double()
