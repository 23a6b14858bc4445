"""Cache of answers: stored as they come, one JSON line each, so that no question is asked twice."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, cast

from eval.errors import EvalError
from eval.own_files import open_own
from eval.redaction import clean_values


ANSWERS_FILE = "answers.jsonl"
_SYNC_SECONDS = 1.0  # a power cut costs the answers of the last second; a kill costs none


def key_of(*parts: Any) -> str:
    """Compute a key for an answer: the SHA-256 of everything that it depends on."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerCache:
    """Answers by key, in memory and, when there is a path, in a file that grows line by line.

    Each line holds its own checksum: a line that was cut off or damaged on the disk is dropped, and its question asked
    again.

    Attributes:
        damaged: number of lines that were dropped.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.damaged = path, 0
        self._answers: dict[str, Any] = {}
        self._file: FileIO | None = None
        self._synced = time.monotonic()
        if path is not None:
            self._open(path)

    def __enter__(self) -> "AnswerCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: str, answer: Any) -> None:
        """Store an answer under its key.

        Raises:
            EvalError: the file cannot be written (the disk is full, say); every answer before this one is kept.
        """
        answer = clean_values(answer)
        self._answers[key] = answer
        if self._file is None:
            return
        line = {"key": key, "answer": answer, "check": _check(key, answer)}
        try:
            rest = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
            while rest:  # a nearly full disk takes a part and refuses the next one
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> None:
        """Flush the answers added so far to the disk itself (``fsync``)."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise self._unwritable(error) from error
        self._synced = time.monotonic()

    def close(self) -> None:
        """Close the file; answers stay in memory."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _open(self, path: Path) -> None:
        try:
            if path.exists():
                self._load(path)
            self._file = cast(FileIO, open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, "ab", buffering=0))
        except OSError as error:
            raise self._unwritable(error) from error

    def _load(self, path: Path) -> None:
        """Read every complete line, and truncate the file after the last one: what follows is half a line."""
        with open_own(path, os.O_RDWR, "r+b") as file:
            end = 0
            for line in file:
                if line.endswith(b"\n"):
                    end += len(line)
                    self._take(line)
            file.truncate(end)

    def _take(self, line: bytes) -> None:
        try:
            entry = json.loads(line.decode())
            if isinstance(entry, Mapping) and entry["check"] == _check(entry["key"], entry["answer"]):
                self._answers[entry["key"]] = entry["answer"]
                return
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self.damaged += 1

    def _unwritable(self, error: OSError) -> EvalError:
        return EvalError(
            f"{self.path} cannot be written ({error.strerror}); the {len(self)} answers before are kept: make room "
            "and give the same command again"
        )


def _check(key: str, answer: Any) -> str:
    return key_of(key, answer)[:16]
