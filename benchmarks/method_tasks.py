"""What methods are compared on: a small Llama on a synthetic source, and SmolLM2-135M on short rows of GSM8K."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor


VOCABULARY, LENGTH = 48, 48
PRETRAINING_STEPS, SHIFT = 1500, 0.3


class Source:
    """Sequences in which each token is drawn by the two before it; ``shift`` is the share of rules that are new."""

    def __init__(self, shift: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(1)
        logits = 2.5 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
        others = 2.5 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
        replaced = torch.rand(VOCABULARY, VOCABULARY, 1, generator=generator) < shift
        self.rules = torch.where(replaced, others, logits).softmax(-1)

    def rows(self, count: int, seed: int) -> Tensor:
        """Draw ``count`` sequences, (count, LENGTH)."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
        for at in range(2, LENGTH):
            rows[:, at] = torch.multinomial(self.rules[rows[:, at - 2], rows[:, at - 1]], 1, generator=generator)[:, 0]
        return rows


def pretrained(folder: Path) -> Path:
    """Train the small model on the unshifted source, once per folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
        )
    )
    source, optimizer = Source(), torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, PRETRAINING_STEPS)
    for step in range(PRETRAINING_STEPS):
        rows = source.rows(64, 10_000 + step)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


Row = dict[str, Any]  # input_ids and labels


class SmallTask:
    """The small Llama and the shifted source; every seed has rows of its own."""

    name, batch_size, rates, bf16, targets = "small", 16, (8e-3, 1.6e-2, 3.2e-2, 6.4e-2), False, "all-linear"
    description = "Llama of 3 layers, width 64, pretrained in the script; order-2 source, 30 % of the rules new"

    def __init__(self, folder: Path, data: str | None) -> None:
        self.base, self.source = pretrained(folder / "base"), Source(SHIFT)

    def training_rows(self, seed: int) -> list[Row]:
        """Return the 1200 rows of a seed."""
        return self._rows(1200, 100 + seed)

    def held_out(self) -> tuple[list[Row], list[Row]]:
        """Return the half that chooses and the half that judges."""
        return self._rows(256, 1), self._rows(256, 2)

    def _rows(self, count: int, seed: int) -> list[Row]:
        return [{"input_ids": row, "labels": row} for row in self.source.rows(count, seed)]


class SmolLM2Task:
    """SmolLM2-135M with its bf16 base, and short rows of GSM8K; every seed orders the same rows."""

    name, batch_size, rates, bf16, targets = "smollm2", 4, (1e-3, 2e-3, 4e-3, 8e-3), True, "all-linear"
    description = "SmolLM2-135M-Instruct, bf16; rows of at most 136 tokens, answers alone take loss"

    def __init__(self, folder: Path, data: str | None) -> None:
        self.base = record.smollm2()
        source, name = record.dataset_folder(data, folder / "rows")
        many = len(record.read_lines(source, name)[0])
        rows = record.read_rows(source, name, self.base, many, answers_only=True)
        short = [row for row in rows if len(row["input_ids"]) <= 136]
        self.halves, self.rows = (short[:64], short[64:128]), short[128:]

    def training_rows(self, seed: int) -> list[Row]:
        """Return the training rows, which are the same for every seed."""
        return self.rows

    def held_out(self) -> tuple[list[Row], list[Row]]:
        """Return the half that chooses and the half that judges."""
        return self.halves


Task = SmallTask | SmolLM2Task


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Put rows into one batch; padding is neither attended to nor learned."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> Tensor:
        pairs = [(torch.as_tensor(row[key]), longest - len(row[key])) for row in rows]
        return torch.stack([torch.nn.functional.pad(tokens, (0, rest), value=value) for tokens, rest in pairs])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "attention_mask": mask}


def loss_of(model: Any, rows: Sequence[Row]) -> float:
    """Compute the mean loss per answer token over ``rows``."""
    model.eval()
    total = tokens = 0.0
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            batch = padded(rows[start : start + 32])
            count = int((batch["labels"][:, 1:] != -100).sum())
            total, tokens = total + float(model(**batch).loss) * count, tokens + count
    return total / tokens
