"""Guard against contamination: tasks with rows that the model was trained or calibrated on are refused."""

import contextlib
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval import reading
from eval.errors import EvalError, UsageError
from eval.own_files import open_plain


_WINDOW = 8  # words that must agree before texts are compared whole
_SHORTEST = 4  # words of a question that is looked for inside longer texts; shorter ones must be a text of their own
# Scripts that put no spaces between words: each character stands for itself, and two for a word. Thai, Lao, Burmese,
# Khmer, kana and Han.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORDS = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_CHARACTER = re.compile(f"[{_UNSPACED}]")


def words_of(text: str) -> tuple[str, ...]:
    """Split a text into words without case and punctuation, in one Unicode form (NFKC).

    In scripts without spaces between words, each character counts as a word.
    """
    return tuple(_WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))


def _long_enough(words: tuple[str, ...]) -> bool:
    return sum(1 if _CHARACTER.fullmatch(word) else 2 for word in words) >= 2 * _SHORTEST


def question_hash(text: str) -> str:
    """Hash the normalised text: questions that differ in case, spacing or punctuation alone have equal hashes."""
    return hashlib.sha256(" ".join(words_of(text)).encode()).hexdigest()


@dataclass
class SeenTexts:
    """Texts that a model was trained or calibrated on.

    A training row often wraps a question in an instruction, so a question inside a longer text counts as seen too.
    """

    _hashes: set[str] = field(default_factory=set)
    _texts: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Add one text that the model has seen."""
        self._hashes.add(question_hash(text))
        self._texts.append(words_of(text))

    def seen_among(self, questions: Iterable[str]) -> list[str]:
        """Return the questions that equal a seen text or are contained in one, in their order."""
        asked = list(questions)
        by_start: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
        for question in asked:
            words = words_of(question)
            if _long_enough(words):
                by_start.setdefault(words[:_WINDOW], set()).add(words)
        inside = {match for text in self._texts for match in _contained(text, by_start)}
        return [q for q in asked if question_hash(q) in self._hashes or words_of(q) in inside]


def _contained(
    text: tuple[str, ...], by_start: Mapping[tuple[str, ...], set[tuple[str, ...]]]
) -> Iterator[tuple[str, ...]]:
    """Find the word sequences, listed under their first words, that occur anywhere in ``text``."""
    for length in {len(start) for start in by_start}:
        for at in range(len(text) - length + 1):
            for words in by_start.get(text[at : at + length], ()):
                if text[at : at + len(words)] == words:
                    yield words


def texts_of(row: Any) -> Iterator[str]:
    """Yield every text in a row, however deeply nested: instruction, messages, conversations."""
    if isinstance(row, str):
        yield row
    elif isinstance(row, Mapping):
        for value in row.values():
            yield from texts_of(value)
    elif isinstance(row, list):
        for value in row:
            yield from texts_of(value)


def read_seen(files: Iterable[Path]) -> SeenTexts:
    """Read the texts of training files: JSON lines, or one JSON document of any shape.

    Raises:
        EvalError: a file does not exist, cannot be read or holds no text.
    """
    seen = SeenTexts()
    for path in files:
        if not os.path.isfile(path):
            raise UsageError([f"--train-file: {path} does not exist"])
        texts = [text for row in _rows(path) for text in texts_of(row)]
        if not any(map(words_of, texts)):
            raise EvalError(f"--train-file: {path} holds no text to compare with; save its rows as JSON lines")
        for text in texts:
            seen.add(text)
    return seen


def _rows(path: Path) -> Iterator[Any]:
    """Read the rows of a JSON-lines file, or a whole JSON document as one row, whatever the file is called."""
    try:
        with open_plain(path, os.O_RDONLY, "rb") as file:
            raw = file.read(reading.MAX_DOCUMENT + 1)
    except OSError as error:
        raise EvalError(f"--train-file: {path} cannot be read ({error.strerror})") from error
    too_long = len(raw) > reading.MAX_DOCUMENT
    if not too_long:
        with contextlib.suppress(ValueError):  # reading line by line gives a better message
            yield reading.loads(raw.decode(), str(path))
            return
    del raw
    try:
        yield from (row for _, row in reading.numbered_rows(path))
    except EvalError as error:
        hint = f"; a file above {reading.MAX_DOCUMENT >> 20} MiB must be JSON lines" if too_long else ""
        raise EvalError(f"{error}{hint}") from error


def files_of_plan(plan: Path, dataset_dir: Path | None) -> list[Path]:
    """Find the files of the calibration data that a rank plan names, by way of ``dataset_info.json``.

    Raises:
        UsageError: the plan or ``dataset_info.json`` cannot be read, or a data set is not a local file.
    """
    try:
        provenance = reading.field(reading.read_object(plan), "provenance", dict, "the plan")
        names = reading.field(provenance, "calibration_dataset", list, "the plan's provenance")
        if not all(isinstance(name, str) for name in names):
            raise EvalError(f"calibration_dataset is {names!r:.60}, not a list of names")
    except EvalError as error:
        raise UsageError([f"--plan: {plan} is no rank plan that names its calibration data ({error})"]) from error
    if dataset_dir is None:
        raise UsageError(
            [
                f"--plan: {plan} names {', '.join(names):.200}; give the run's dataset_dir as --dataset-dir to find "
                "the files"
            ]
        )
    table = dataset_dir / "dataset_info.json"
    try:
        info = reading.read_object(table)
    except EvalError as error:
        raise UsageError([f"--dataset-dir: {error}; give the folder of the run's dataset_info.json"]) from error
    return [_file_of(name, info, dataset_dir) for name in names]


def _file_of(name: str, info: Mapping[str, Any], folder: Path) -> Path:
    entry = info.get(name)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("file_name"), str):
        raise UsageError(
            [
                f"--plan: its data set {name!r:.60} is no file of {folder / 'dataset_info.json'}; save its rows as "
                "JSON lines and give them as --train-file"
            ]
        )
    path = folder / str(entry["file_name"])
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise UsageError([f"--plan: {path}, the file of its data set {name!r:.60}, {what}; give --train-file instead"])
    return path


def refuse_seen(task: str, questions: Iterable[str], seen: SeenTexts) -> None:
    """Refuse a task with rows that the model has seen.

    Raises:
        EvalError: there are such rows; the message has their number and the first of them.
    """
    asked = list(questions)
    seen_questions = seen.seen_among(asked)
    if seen_questions:
        raise EvalError(
            f"{task}: {len(seen_questions)} of {len(asked)} rows were in the training or calibration data, first: "
            f"{seen_questions[0][:200]!r}; score rows that the model has not seen"
        )
