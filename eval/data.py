"""Local rows: ``DATA_DIR/TASK/SPLIT.jsonl`` in place of the hub, checked line by line before anything starts."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.errors import UsageError
from eval.protocols import Task
from eval.reading import numbered_rows


_LONE = re.compile("[\ud800-\udfff]")


def local_files(task: Task, data_dir: Path, split: str) -> dict[str, Path]:
    """Return the files of one task: ``test``, and ``train`` where examples are drawn from it."""
    folder = data_dir / str(task.config["metadata"].get("folder", task.name))
    files = {"test": folder / f"{split}.jsonl"}
    return {**files, "train": folder / "train.jsonl"} if task.fewshot else files


def check_files(task: Task, files: Mapping[str, Path]) -> None:
    """Read every row of a task's files once, and check that the task can use it.

    Raises:
        UsageError: a file is missing or empty, or a row lacks a field that the task reads or cannot be scored.
        EvalError: a file cannot be read, or a line is no JSON object.
    """
    for split, path in files.items():
        if not os.path.isfile(path):  # false, not an error, for a name too long as well
            raise UsageError([f"--data-dir: {task.name} of {task.protocol} reads {path}, which does not exist"])
        number = 0
        for number, row in numbered_rows(path):
            _check_row(task, row, f"{path}:{number}", scored=split == "test")
            _check_storable(row, f"{path}:{number}")
        if number == 0:
            raise UsageError([f"--data-dir: {path} holds no rows"])


def read_splits(files: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Read the rows of every split, each with all the keys that any row of its file has.

    Rows are scored as they are in the file: a folder's name is not expanded as a pattern, no text becomes a date.
    """
    return {split: _same_keys([row for _, row in numbered_rows(path)]) for split, path in files.items()}


def _same_keys(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]


def _check_storable(row: Mapping[str, Any], where: str) -> None:
    """Refuse values that JSON can hold and a table of rows cannot, also in fields that the task does not read."""
    for name, value in row.items():
        for inner in (name, *_parts(value)):
            if isinstance(inner, int) and not -(2**63) <= inner < 2**64:
                raise UsageError([f"{where}: {name!r:.60} holds a whole number beyond 64 bits; write it as a text"])
            if isinstance(inner, str) and _LONE.search(inner):
                raise UsageError(
                    [f"{where}: {name!r:.60} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text; "
                     "write the whole character"]
                )  # fmt: skip


def _parts(value: Any) -> Iterator[Any]:
    """Yield a value and everything nested inside it; the depth is bounded where rows are read."""
    yield value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _parts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _parts(inner)


def _check_row(task: Task, row: Mapping[str, Any], where: str, scored: bool) -> None:
    for field in task.fields:
        if not any(row.get(name) is not None for name in field.split("|")):
            hint = ""
            if field == "passage":
                hint = (
                    "; lm_eval's BoolQ shows the passage. Try --tasks boolq_no_passage (another task, not comparable "
                    "with published figures) or --protocol llm_adapters, which shows none"
                )
            names = field.replace("|", " or ")
            raise UsageError([f"{where}: {task.name} of {task.protocol} needs the field {names}{hint}"])
    if scored and (problem := task.problem_with(row)) is not None:
        raise UsageError([f"{where}: {task.name} of {task.protocol} cannot be scored: {problem}"])
