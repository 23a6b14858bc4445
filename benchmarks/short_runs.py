"""What benchmarks of many short trainings share: a ledger to go on from, short rows, a small model, a plain LoRA run.

Everything runs in one process, without LLaMA-Factory: what is compared are ranks, and a run takes a minute or two.
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_linear_schedule_with_warmup,
)

from llamafactory_adaptive.calibration.batches import Batch, make_batches


Row = dict[str, list[int]]
SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
BLOCK, BLOCKS = 128, 16  # tokens of a block of pretraining text, blocks of a step


class Ledger:
    """Results by the settings they came from, one JSON line each; what stands there is not computed again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        *lines, unfinished = text.split("\n")
        if unfinished:  # a kill in the middle of a line
            path.write_text(text.removesuffix(unfinished), encoding="utf-8")
        self.entries = {self._key(entry["settings"]): entry["result"] for entry in map(json.loads, lines)}

    def result(self, settings: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        key = self._key(settings)
        if key not in self.entries:
            entry = json.dumps({"settings": settings, "result": compute()})
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(entry + "\n")
            self.entries[key] = json.loads(entry)["result"]
        return self.entries[key]

    @staticmethod
    def _key(settings: Mapping[str, Any]) -> str:
        return json.dumps(settings, sort_keys=True)


def token_rows(pairs: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Question, line break, answer, end; loss on the answer alone. No chat template: base models have none."""
    start = [] if tokenizer.bos_token_id in (None, tokenizer.eos_token_id) else [tokenizer.bos_token_id]
    rows = []
    for question, answer in pairs:
        prompt = start + tokenizer(f"{question}\n", add_special_tokens=False)["input_ids"]
        reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return rows


def cut(rows: Sequence[Row], tokens: int) -> list[Row]:
    return [{key: values[:tokens] for key, values in row.items()} for row in rows]


def load(model: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A model in the precision of its files, without gradients, and its tokenizer.

    Attention is the eager one: torch's own takes a quarter of a step of short rows on a CPU, going back in bf16.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="eager")
    return loaded.requires_grad_(False), AutoTokenizer.from_pretrained(model)


def pretrain_small(folder: Path, texts: Sequence[str], steps: int) -> Path:
    """A small Qwen3 with a vocabulary of its own, pretrained on texts; one that lies in the folder is re-used."""
    if not (folder / "config.json").exists():
        tokenizer = _own_vocabulary(texts)
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**SMALL, tie_word_embeddings=True, eos_token_id=0, pad_token_id=0))
        stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        blocks = torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).reshape(-1, BLOCK)
        generator = torch.Generator().manual_seed(0)
        for step in _steps(model, steps, 3e-3):
            ids = blocks[torch.randint(len(blocks), (BLOCKS,), generator=generator)]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            if step % 50 == 0:
                print(f"pretraining the small model: step {step} of {steps}, loss {loss:.3f}", flush=True)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def _own_vocabulary(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, SMALL["vocab_size"], special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>")


def _steps(model: nn.Module, steps: int, rate: float) -> Iterable[int]:
    """Steps of a training: the optimizer acts after each. A tenth of them is warm-up, then the rate falls to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
    model.train()
    for step in range(steps):
        yield step
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def answer_loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """Summed loss of a batch's answers, and their number of tokens. No logits of prompts: most of them, and unread."""
    decoder = getattr(model, "get_base_model", lambda: model)()
    labels = batch.labels[:, 1:]
    picked = labels != -100
    with torch.autocast("cpu", torch.bfloat16, enabled=decoder.dtype == torch.bfloat16):
        hidden = decoder.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
        logits = decoder.lm_head(hidden[:, :-1][picked])
    loss = nn.functional.cross_entropy(logits.float(), labels[picked], reduction="sum")
    return loss, int(picked.sum())


def held_out_loss(model: nn.Module, rows: Sequence[Row], batch_size: int) -> float:
    model.eval()
    with torch.no_grad():
        parts = [answer_loss(model, batch) for batch in make_batches(rows, batch_size, 0)]
    return sum(float(loss) for loss, _ in parts) / sum(tokens for _, tokens in parts)


def train_lora(
    base: nn.Module, ranks: Mapping[str, int], train: Sequence[Row], held_out: Sequence[Row], seed: int,
    steps: int, batch_size: int, rate: float,
) -> dict[str, Any]:  # fmt: skip
    """A plain LoRA with alpha/r = 2 in every module; its held-out loss and curve. The base is left as it was."""
    draw, order = random.Random(seed), []
    while len(order) < steps * batch_size:  # epoch by epoch
        order += draw.sample(range(len(train)), len(train))
    torch.manual_seed(seed)
    config = LoraConfig(
        r=max(ranks.values()), lora_alpha=2 * max(ranks.values()), target_modules=list(ranks),
        rank_pattern=dict(ranks), alpha_pattern={name: 2 * rank for name, rank in ranks.items()},
    )  # fmt: skip
    model = get_peft_model(base, config)  # factors in fp32, whatever the base is
    curve = []
    for step in _steps(model, steps, rate):
        picked = [train[index] for index in order[step * batch_size : (step + 1) * batch_size]]
        loss, tokens = answer_loss(model, make_batches(picked, batch_size, 0)[0])
        (loss / tokens).backward()
        curve.append(round(float(loss.detach()) / tokens, 4))
    loss_after = held_out_loss(model, held_out, 2 * batch_size)
    model.unload()
    return {"loss": loss_after, "curve": curve}


class Pairs:
    """Question and answer of every row, by data set; the first one's held-out lines are seen by nothing else."""

    def __init__(self, data: str | None, scratch: Path) -> None:
        folder, self.name = record.dataset_folder(data, scratch / "rows")
        self.held_out, self.train = self._shuffled(folder, self.name, share=8)
        self.other: list[tuple[str, str]] = []
        if self.name == "gsm8k":
            folder, _ = record.dataset_folder(data, scratch / "boolq", "boolq")
            self.other = self._shuffled(folder, "boolq", share=1)[0]

    @staticmethod
    def _shuffled(folder: Path, name: str, share: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        lines, pair = record.read_lines(folder, name)
        lines = list(dict.fromkeys(lines))
        pairs = [pair(line) for line in random.Random(0).sample(lines, len(lines))]
        return pairs[: len(pairs) // share], pairs[len(pairs) // share :]

    def questions(self) -> list[str]:
        """What the small model is pretrained on: questions without answers."""
        return [question for question, _ in (*self.train, *self.other)]

    def calibration(self, tokenizer: PreTrainedTokenizerBase, samples: int) -> dict[str, list[Row]]:
        """Two halves of the calibration rows, and rows of the other data set where there is one."""
        half = samples // 2
        parts = {"first_half": self.train[:half], "second_half": self.train[half:samples]}
        parts |= {"other": self.other[:samples]} if self.other else {}
        return {part: cut(token_rows(pairs, tokenizer), 256) for part, pairs in parts.items()}

    def short(self, tokenizer: PreTrainedTokenizerBase, tokens: int, held_out: int) -> tuple[list[Row], list[Row]]:
        """Rows to train on and held-out ones that fit into ``tokens``, so that none is cut."""
        train, kept = (
            [row for row in token_rows(pairs, tokenizer) if len(row["input_ids"]) <= tokens]
            for pairs in (self.train, self.held_out)
        )
        return train, kept[:held_out]
