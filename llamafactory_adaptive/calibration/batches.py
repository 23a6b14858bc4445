"""Padded batches of token rows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        """Return the batch on another device."""
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device))


def holds_media(row: Mapping[str, Any]) -> bool:
    """Tell whether a row has images, video or audio beside its tokens."""
    return any(row.get(kind) for kind in ("images", "videos", "audios"))


def length_sorted(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Group row numbers by similar length, longest first: little padding, and memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def make_batches(rows: Sequence[Mapping[str, Sequence[int]]], batch_size: int, pad_id: int) -> list[Batch]:
    """Build batches of rows of similar length, longest first, padded on the right.

    Args:
        rows: each with ``input_ids`` and ``labels`` of equal length.
        batch_size: samples per batch.
        pad_id: token that fills up shorter rows; the attention mask leaves it out.
    """
    groups = length_sorted([len(row["input_ids"]) for row in rows], batch_size)
    return [_pad([rows[index] for index in group], pad_id) for group in groups]


def _pad(group: Sequence[Mapping[str, Sequence[int]]], pad_id: int) -> Batch:
    width = max(len(row["input_ids"]) for row in group)

    def column(key: str, fill: int) -> Tensor:
        return torch.tensor([list(row[key]) + [fill] * (width - len(row[key])) for row in group])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in group])
    return Batch(column("input_ids", pad_id), mask, column("labels", IGNORE_INDEX))


def count_tokens(batches: Iterable[Batch]) -> int:
    """Count the tokens of all batches, padding left out."""
    return int(sum(int(batch.attention_mask.sum()) for batch in batches))
