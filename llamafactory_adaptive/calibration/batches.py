"""Token rows as padded batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Right-padded token rows; ``labels`` holds -100 where no loss is taken. All of shape (samples, tokens)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def make_batches(rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int, pad_id: int) -> list[Batch]:
    """Group rows of similar length, longest first (an out-of-memory shows at once), and pad on the right.

    Args:
        rows: each with ``input_ids`` and ``labels`` of equal length.
        batch_size: samples per batch.
        pad_id: token put where a row is shorter; it never counts.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    picked = [[rows[index] for index in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]
    return [_pad(group, pad_id) for group in picked]


def _pad(group: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> Batch:
    width = max(len(row["input_ids"]) for row in group)

    def column(key: str, fill: int) -> Tensor:
        return torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in group])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in group])
    return Batch(column("input_ids", pad_id), mask, column("labels", IGNORE_INDEX))


def count_tokens(batches: Iterable[Batch]) -> int:
    """Tokens that count, padding left out."""
    return int(sum(int(batch.attention_mask.sum()) for batch in batches))
