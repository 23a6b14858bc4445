"""Scores of training samples under the Trainer: the batches they come from, and the file that keeps them."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

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


def write_terms(path: Path, terms: SampleTerms, rows: str) -> None:
    """Write the quality terms, and the digest of the rows that they were measured on."""
    tensors = {
        entry.name: vector.contiguous() for entry, vector in zip(fields(SampleTerms), term_vectors(terms), strict=True)
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"rows": rows})


def read_terms(path: Path, rows: str) -> SampleTerms | None:
    """Read the quality terms; None if the file is missing, damaged, of other rows, or holds NaN or infinity."""
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("rows") != rows:
                return None
            vectors = [file.get_tensor(entry.name) for entry in fields(SampleTerms)]
            return SampleTerms(*vectors) if all(bool(vector.isfinite().all()) for vector in vectors) else None
    except (OSError, SafetensorError):
        return None
