"""IGU-LoRA under the plain transformers.Trainer: ranks are found while the adapter trains. No LLaMA-Factory.

    pip install .   # in a checkout of the plugin
    python examples/python/igu_trainer.py Qwen/Qwen2.5-0.5B rows.jsonl out --rank 16 --steps 200

Each line of rows.jsonl is {"prompt": "...", "completion": "..."}. The folder then holds a plain PEFT adapter.
"""

import argparse
import json

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from llamafactory_adaptive import check_adapter, rank_search


def token_rows(path, tokenizer, longest=1024):
    """Tokenise prompt and completion; only the completion takes a loss."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            ids = (prompt + answer)[:longest]
            rows.append({"input_ids": ids, "labels": ([-100] * len(prompt) + answer)[:longest]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--rank", type=int, default=16, help="the budget, as the rank of a uniform LoRA")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--interval", type=int, default=10, help="steps between two allocations")
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(given.model)

    search = rank_search(model, method="igu", lora_rank=given.rank, interval=given.interval)
    trainer = search.trainer(Trainer)(
        model=search.model,
        args=TrainingArguments(
            given.out, max_steps=given.steps, per_device_train_batch_size=4, learning_rate=2e-4, logging_steps=10,
            save_strategy="no", report_to="none",
        ),
        train_dataset=token_rows(given.data, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[search.callback],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(given.out)

    plan = search.finalize(given.out)
    print(plan.table())
    print(f"{check_adapter(given.out, plan)} of {len(plan.active)} modules untrained; adapter in {given.out}")


if __name__ == "__main__":
    main()
