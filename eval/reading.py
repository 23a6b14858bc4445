"""Reader of untrusted JSON with limits on size, depth and types; a violation raises an EvalError."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.own_files import open_plain


MAX_DEPTH = 100
MAX_RESULTS = 64 * 2**20  # bytes of a results file or a model's config; real ones take kilobytes
MAX_DOCUMENT = 2**30  # bytes of training rows that are one document; longer ones are read line by line
_LARGEST = 2**63
MAX_LINE = 16 * 2**20  # bytes of one row
MAX_SAMPLE = 16 * MAX_LINE  # of one sample: the row is in it twice, and the answer with what was read in it


def loads(text: str, where: str) -> Any:
    """Parse JSON text of at most ``MAX_DEPTH`` levels.

    Raises:
        EvalError: the value is nested more deeply.
        ValueError: the text is not JSON.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value, deep = None, True
    else:
        deep = _deeper(value, MAX_DEPTH)
    if deep:
        raise EvalError(f"{where}: this JSON is nested more than {MAX_DEPTH} levels deep; nothing of ours is")
    return value


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return False
    return True


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        EvalError: the file is missing, not a regular one, too large, not UTF-8 or not JSON, or holds no object.
    """
    try:
        with open_plain(path, os.O_RDONLY, "rb") as file:
            raw = file.read(MAX_RESULTS + 1)
        if len(raw) > MAX_RESULTS:
            raise EvalError(f"{path}: this file is larger than {MAX_RESULTS >> 20} MiB; nothing of ours is")
        value = loads(raw.decode(), str(path))
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # UnicodeDecodeError too
        raise EvalError(f"{path}: this is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise EvalError(f"{path}: it must hold a JSON object, this is {type(value).__name__}")
    return value


def numbered_rows(path: Path, longest: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the row of each line of a JSON-lines file; empty lines are skipped.

    Args:
        path: the file.
        longest: most bytes of a line; None for ``MAX_LINE``.

    Raises:
        EvalError: a line is no JSON object, too long or too deep, or the file cannot be read.
    """
    most = MAX_LINE if longest is None else longest
    try:
        with open_plain(path, os.O_RDONLY, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(most + 1), b""), 1):
                if line.strip():
                    yield number, _row(line, f"{path}:{number}", most)
    except OSError as error:
        raise EvalError(f"{path}: cannot be read ({error.strerror})") from error


def _row(line: bytes, where: str, most: int) -> dict[str, Any]:
    if len(line) > most:
        raise EvalError(f"{where}: this line is longer than {most >> 20} MiB")
    try:
        row = loads(line.decode(), where)
    except UnicodeDecodeError as error:
        raise EvalError(f"{where}: this is no UTF-8 text; save the rows as JSON lines") from error
    except ValueError as error:
        raise EvalError(f"{where}: this line is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise EvalError(f"{where}: a row must be a JSON object, this is {type(row).__name__}")
    return row


def field(record: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of a certain type from a record.

    True and false are no numbers, and numbers must be finite and below 2^63 in size.

    Raises:
        EvalError: the field is missing or of another type.
    """
    value = record.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits or (isinstance(value, (int, float)) and not abs(value) < _LARGEST):
        names = " or ".join(one.__name__ for one in kinds)
        shown = "missing" if key not in record else f"{value!r:.60}"
        raise EvalError(f"{where}: {key!r} is {shown}, it must be {names}; this file is damaged or not ours")
    return value
