"""Runs through LLaMA-Factory's own entry in this process, and what they left."""

import json

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.reports.data_report import SAMPLES_FILE


EVALUATE = {"eval_dataset": "tiny_eval", "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps",
            "save_steps": 1}  # fmt: skip


class Keep(TrainerCallback):
    """Keeps the live model, and can stop a run at a step as a crash would (without the final save)."""

    def __init__(self, crash_at=None):
        self.crash_at = crash_at

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.crash_at:
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, model, **kwargs):
        self.model = model


def train(args, **options):
    _bootstrap.install()
    from llamafactory.train.tuner import run_exp

    keep = Keep(**options)
    run_exp(args, [keep])
    return keep


def ids(count=12):
    return torch.arange(20, 20 + count)[None]


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids()).logits.float()


def peft_logits(base, adapter):
    """The adapter as anyone would load it: plain PEFT, nothing of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter))


def lines(out):
    """The lines of the log, but for that of the end, with what the whole run has cost."""
    told = [json.loads(line) for line in (out / "adaptive_log.jsonl").read_text().splitlines()]
    return [line for line in told if line.get("event") != "end"]


def allocations(out):
    return [line for line in lines(out) if line["event"] == "allocation"]


def adapters_equal(first, second):
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def samples(out):
    return [json.loads(line) for line in (out / SAMPLES_FILE).read_text().splitlines()]


def batches_seen(monkeypatch):
    """Token rows of every training batch, in order, as the model gets them."""
    from transformers import Trainer

    seen, original = [], Trainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", step)
    return seen
