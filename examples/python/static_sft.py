"""Sensitivity-LoRA with TRL's SFTTrainer: score the base model, plan ranks, attach the adapter, train, check.

    pip install ".[examples]"   # in a checkout of the plugin
    python examples/python/static_sft.py Qwen/Qwen2.5-0.5B rows.jsonl out --rank 16 --steps 200

Each line of rows.jsonl is {"prompt": "...", "completion": "..."}. The folder then holds a plain PEFT adapter.
"""

import argparse
import json

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from llamafactory_adaptive import attach_adapter, calibration_batches, check_adapter, plan_ranks, score_modules


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--rank", type=int, default=16, help="the budget, as the rank of a uniform LoRA")
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(given.model).to("cuda" if gpu else "cpu")
    with open(given.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]

    tokens = [{"input_ids": tokenizer(row["prompt"] + row["completion"])["input_ids"]} for row in rows[:128]]
    scores = score_modules(model, calibration_batches(tokens, batch_size=8, pad_id=tokenizer.pad_token_id))
    plan = plan_ranks(scores, lora_rank=given.rank)
    print(plan.table())

    trainer = SFTTrainer(
        model=attach_adapter(model, plan),
        args=SFTConfig(
            given.out, max_steps=given.steps, per_device_train_batch_size=4, learning_rate=2e-4, logging_steps=10,
            save_strategy="no", report_to="none", bf16=gpu and torch.cuda.is_bf16_supported(),
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(given.out)
    print(f"{check_adapter(given.out, plan)} of {len(plan.active)} modules untrained; adapter in {given.out}")


if __name__ == "__main__":
    main()
