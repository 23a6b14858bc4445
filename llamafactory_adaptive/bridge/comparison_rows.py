"""Rows of a comparison: tokenised once, and split into those that all arms train on and two held-out halves."""

import hashlib
import json
import os
import random
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, our_keys, split_names
from llamafactory_adaptive.bridge.fingerprint import identity
from llamafactory_adaptive.bridge.host_loading import open_host
from llamafactory_adaptive.bridge.scoring_job import TRAINING_ONLY
from llamafactory_adaptive.calibration.batches import IGNORE_INDEX, holds_media
from llamafactory_adaptive.comparison.differences import FEWEST_ROWS
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.files import cannot_write, digest_of


HELD_OUT, TRAIN, COUNTS = "held_out.json", "train", "split.json"
_LARGEST_SHARE = 5  # of the training rows at most a fifth is held out, however many are asked for
_FEWEST = 2 * FEWEST_ROWS

Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class SplitJob:
    """The split of a run's rows into those that all arms train on, and two held-out halves.

    Attributes:
        settings: the settings of the YAML; ``eval_dataset`` or ``val_size``, if given, say which rows are held out.
        rows: number of held-out rows at most, of both halves together.
        folder: receives the tokenised rows, complete or not at all.
    """

    settings: Args
    rows: int
    folder: str

    def run(self) -> dict[str, Any]:
        """Tokenise and split the rows, and return how many there are of each part, and the digest of each file."""
        with open_host(base_settings(self.settings), "the comparison") as host:
            train, held_out = host.read_rows(self._split)
        halves = {"dev": held_out[::2], "test": held_out[1::2]}
        counts: dict[str, Any] = {"train": len(train), **{half: len(rows) for half, rows in halves.items()}}
        counts |= {"train_sha256": rows_digest(train), "held_out_sha256": rows_digest(held_out)}
        folder = Path(self.folder)
        scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            train.save_to_disk(str(scratch / TRAIN))
            (scratch / HELD_OUT).write_text(json.dumps(halves), encoding="utf-8")
            (scratch / COUNTS).write_text(json.dumps(counts), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(scratch, folder)
        except OSError as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return counts

    def _split(self, data: Mapping[str, Any]) -> tuple[Any, Rows]:
        """Return the training set without the held-out rows, and these, in random order and each once."""
        train, given = data["train_dataset"], data.get("eval_dataset")
        if given is None:
            source, most = train, min(self.rows, max(len(train) // _LARGEST_SHARE, min(_FEWEST, len(train) // 2)))
        else:
            sets = list(given.values()) if isinstance(given, Mapping) else [given]
            source, most = [row for rows in sets for row in rows], self.rows
        held_out: dict[tuple[int, ...], dict[str, list[int]]] = {}
        for index in random.Random(0).sample(range(len(source)), len(source)):
            if len(held_out) >= most:
                break
            row = _tokens(source[index])
            if any(label != IGNORE_INDEX for label in row["labels"][1:]):
                held_out.setdefault(tuple(row["input_ids"]), row)
        if len(held_out) < _FEWEST:
            raise CalibrationError(
                f"{len(held_out)} different rows with an answer can be held out, and a comparison needs {_FEWEST}: "
                "give more rows, or an eval_dataset"
            )
        kept = [index for index, ids in enumerate(train["input_ids"]) if tuple(ids) not in held_out]
        return train.select(kept), list(held_out.values())


def rows_identity(given: Args, rows: int) -> dict[str, Any]:
    """Collect everything that the split depends on: settings and data files; and the model that is trained."""
    settings = {**base_settings(given), "dataset": ",".join(_data_sets(given))}
    parts = {key: given.get(key) for key in ("dataset", "eval_dataset", "eval_on_each_dataset")}
    return {**identity(settings), **parts, "rows": rows}


def _data_sets(given: Args) -> list[str]:
    return [*split_names(given.get("dataset")), *split_names(given.get("eval_dataset"))]


def rows_folder(parent: Path, known: Mapping[str, Any]) -> Path:
    """Return the folder of the rows that :func:`rows_identity` describes."""
    return parent / digest_of(known)[:16]


def rows_digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """Compute the SHA-256 of tokens and labels of rows, in their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return total.hexdigest()


def base_settings(settings: Args) -> Args:
    """Return the settings by which the host loads base model and rows, without an adapter."""
    dropped = {*TRAINING_ONLY, *our_keys(settings), "adapter_name_or_path"} - {"eval_dataset"}
    kept = {key: value for key, value in settings.items() if key not in dropped}
    return {**kept, "finetuning_type": "lora", "do_train": True, "report_to": "none", "packing": False}


def answer_tokens(rows: Sequence[Mapping[str, Sequence[int]]]) -> list[int]:
    """Count the labelled tokens of each row."""
    return [sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in rows]


def _tokens(row: Mapping[str, Any]) -> dict[str, list[int]]:
    if holds_media(row):
        raise CalibrationError("rows hold images, video or audio, and a comparison measures the loss of texts")
    if "input_ids" not in row or "labels" not in row:
        raise CalibrationError("rows have no single answer: a comparison takes stage: sft")
    if len(row["input_ids"]) != len(row["labels"]):
        raise CalibrationError("rows have labels for other tokens than their own, so that they have no loss")
    return {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}
