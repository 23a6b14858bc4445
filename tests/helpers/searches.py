"""Searches for ranks by the Python API on a tiny model, and Trainers for them."""

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from llamafactory_adaptive import rank_search
from tests.helpers.tiny import rows, tiny_model, tiny_tokenizer


def searching(**more):
    return rank_search(tiny_model(), **{"lora_rank": 2, "interval": 2, "importance": "off", **more})


def given_to(search, folder, **more):
    """What a Trainer of a search is built with; ``more`` are training arguments."""
    arguments = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
                 "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, **more}  # fmt: skip
    return {
        "model": search.model,
        "args": TrainingArguments(str(folder), **arguments),
        "train_dataset": rows(12),
        "data_collator": DataCollatorForSeq2Seq(tiny_tokenizer()),
    }


def trainer_of(search, folder, model=None, trainer_class=Trainer, **more):
    given = given_to(search, folder, **more)
    return search.trainer(trainer_class)(**given | ({} if model is None else {"model": model}))
