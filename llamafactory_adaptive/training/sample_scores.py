"""Scores of training samples under the Trainer: the batches they come from, and the file that keeps them."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from llamafactory_adaptive.files import replacing
from llamafactory_adaptive.sampling.quality import SampleTerms


class ScoringBatches:
    """This process's scoring batches, as the run's own collator and workers make them.

    Args:
        dataset: map-style dataset.
        collator: makes a batch of tensors from rows.
        groups: row numbers of each batch.
        workers: processes that prepare batches ahead.
    """

    def __init__(self, dataset: Any, collator: Any, groups: list[list[int]], workers: int) -> None:
        self.groups = groups
        self.loader = DataLoader(dataset, batch_sampler=groups, collate_fn=collator, num_workers=workers)

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
        for group, batch in zip(self.groups, self.loader, strict=True):
            yield group, dict(batch)


def term_vectors(terms: SampleTerms) -> list[Tensor]:
    """List the measured vectors in the order of their fields."""
    return [getattr(terms, entry.name) for entry in fields(SampleTerms)]


def write_terms(path: Path, scored: Sequence[SampleTerms], rows: str) -> None:
    """Write the quality terms, and the digest of the rows that they were measured on.

    Args:
        path: the file.
        scored: terms of the first scoring, then of each time that samples were scored again.
        rows: the digest.
    """
    tensors = {
        _key(entry.name, number): vector.contiguous()
        for number, terms in enumerate(scored)
        for entry, vector in zip(fields(SampleTerms), term_vectors(terms), strict=True)
        if entry.name != "cluster" or number == 0  # clusters stay those of the first scoring
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"rows": rows})


def read_terms(path: Path, rows: str) -> list[SampleTerms]:
    """Read the quality terms that :func:`write_terms` wrote, also those of earlier versions.

    The list is empty if the file is missing, damaged, of other rows, or holds NaN or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("rows") != rows:
                return []
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (a handle, not a dict)
    except (OSError, SafetensorError):
        return []
    if not all(bool(vector.isfinite().all()) for vector in tensors.values()):
        return []
    scored: list[SampleTerms] = []
    while (key := _key("loss", len(scored))) in tensors:  # earlier versions knew no clusters
        tensors.setdefault("cluster", torch.full_like(tensors[key], -1.0))
        tensors[_key("cluster", len(scored))] = tensors["cluster"]
        if not all(_key(entry.name, len(scored)) in tensors for entry in fields(SampleTerms)):
            return []
        scored.append(SampleTerms(**{e.name: tensors[_key(e.name, len(scored))] for e in fields(SampleTerms)}))
    return scored


def _key(name: str, number: int) -> str:
    """Build the name of a vector in the file; those of the first scoring have the names that they always had."""
    return f"{name}.{number}" if number else name
