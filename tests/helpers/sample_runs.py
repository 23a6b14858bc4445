"""Samples chosen under what stands for a Trainer, and an adapter that stands for one in training."""

from types import SimpleNamespace

import peft
import torch

from llamafactory_adaptive.adapter.lora import lora_config_arguments
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.training.run_log import RunLog
from llamafactory_adaptive.training.sample_preparation import TrainingSamples
from llamafactory_adaptive.training.sample_scoring import SampleRequest
from tests.helpers.dynamic import start_plan
from tests.helpers.tiny import rows, tiny_model, tiny_tokenizer


SAMPLES = 12
STEPS = 9  # refreshes after 2, 4, 6 and 8
PLAN = start_plan(tiny_model())
SAVED = SimpleNamespace(should_save=True)


def _collate(samples):
    (one,) = make_batches(samples, len(samples), 0)
    return {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": one.labels}


def live_adapter(seed=0):
    """A tiny model with an adapter whose factors are not zero."""
    base = tiny_model()
    model = peft.get_peft_model(
        base, peft.LoraConfig(**lora_config_arguments(start_plan(base)), task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def begin_sampling(folder, live, resumed=None, samples=None, seed=3, identity="a", steps_of_epoch=None, workers=0,
                   **options):  # fmt: skip
    """Begin a run on samples, with its cache in a folder; returns its selection."""
    arguments = SimpleNamespace(
        remove_unused_columns=False, train_batch_size=2, world_size=1, gradient_accumulation_steps=1,
        device=torch.device("cpu"), dataloader_num_workers=workers, dataloader_prefetch_factor=None,
        learning_rate=1e-3, bf16=False, fp16=False, deepspeed=None, push_to_hub=False,
    )  # fmt: skip
    trainer = SimpleNamespace(args=arguments, train_dataset=rows(SAMPLES) if samples is None else samples, model=live,
                              data_collator=_collate, processing_class=tiny_tokenizer())  # fmt: skip
    (folder / "cache").mkdir(exist_ok=True)
    settings = TsqOptions(**{"subset_ratio": 0.5, "temperature": 2.0, "refresh_ratio": 0.25, **options})
    request = SampleRequest(Tsq(settings).sampling, seed, {"model": identity}, folder / "cache")
    prepared = TrainingSamples(request, trainer)
    dataloader = range(steps_of_epoch or len(prepared.sampler) // 2)
    return prepared.prepare_samples(PLAN, STEPS, dataloader, resumed, RunLog("tsq", 0.0))


def scored_again(*_, **__):
    """In place of the measurement, where none may be made."""
    raise AssertionError("samples were scored again")
