"""Files of a run: their names, atomic writes, checked reads of JSON, digests of folders and of cache entries."""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llamafactory_adaptive.errors import AdaptiveError, OutputError, PlanError


PLAN_FILE = "adaptive_rank_plan.json"
STATE_JSON = "adaptive_state.json"  # in checkpoints of runs that find their ranks
STATE_TENSORS = "adaptive_state.safetensors"  # beside it
STATE_PIECE = "adaptive_state-{number:05d}-of-{count:05d}.safetensors"  # of one process, from an earlier version
TRAINER_STATE = "trainer_state.json"  # of the Trainer, in checkpoints and, once a run has ended, in output_dir
# A checkpoint that can be resumed has both; the Trainer writes its state last.
COMPLETE = (PLAN_FILE, TRAINER_STATE)
QUALITY_FILE = "adaptive_quality.safetensors"  # what was measured of each training sample, in checkpoints
CUT_FILE = "shrink_certificate.json"  # beside an adapter that was cut to a budget after training
CERTIFICATE_FILE = "parity_certificate.json"  # beside what was exported for a server
LOG_FILE = "adaptive_log.jsonl"  # written as a run begins, at each allocation and at its end
DIGESTS_FILE = "adaptive_digests.json"  # of every other file of a checkpoint
# The Trainer pushes nothing whose name begins with an underscore: host names and an older run's texts stay here.
LOCK_FILE = "_adaptive_lock"
PREVIOUS_FOLDER = "_adaptive_previous"  # what an older run in the same folder left behind

_MOST_BYTES = 256 * 2**20
_DEEPEST = 64
_LITTLE = 2**16  # bytes: a disk with no more is full
logger = logging.getLogger("llamafactory.adaptive")


# -- reading ----------------------------------------------------------------------------------------------------------


def read_json(
    path: Path, name: str, hint: str = "", *, error: type[AdaptiveError] = PlanError, finite: bool = True
) -> Any:
    """Read a JSON document of any origin, and refuse what is too large, too deeply nested or no JSON.

    Args:
        path: a regular file.
        name: what messages call the file.
        hint: ends the message where the file cannot be read.
        error: the class of errors raised.
        finite: whether NaN and infinity are refused.

    Raises:
        AdaptiveError: (of class ``error``) the file cannot be read, or holds what is refused.
    """
    try:
        if path.exists() and not path.is_file():
            raise error(f"{name} is no regular file")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise error(f"{name} has {size:,} bytes; at most {_MOST_BYTES:,} are read")
        document = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=_refuse_constant if finite else None,
            parse_float=_finite_float if finite else None,
        )
    except OSError as fault:
        raise error(f"cannot read {name}: {fault.strerror or fault}{hint}") from fault
    except ValueError as fault:
        raise error(f"{name} is not valid JSON: {fault}") from fault
    except RecursionError as fault:
        raise error(f"{name} is nested more than {_DEEPEST} levels deep") from fault
    if _deeper_than(document, _DEEPEST):
        raise error(f"{name} is nested more than {_DEEPEST} levels deep")
    return document


def read_mapping(path: Path, name: str, hint: str = "", **how: Any) -> dict[str, Any]:
    """Read a JSON document, and refuse one that is no mapping; arguments and errors as in :func:`read_json`."""
    document = read_json(path, name, hint, **how)
    if not isinstance(document, dict):
        raise how.get("error", PlanError)(f"{name} is no JSON mapping but a {type(document).__name__}")
    return document


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON number")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is out of range")
    return number


def _deeper_than(document: Any, levels: int) -> bool:
    """Tell whether a document nests deeper than ``levels``, without recursion, so that no depth exhausts the stack."""
    layer = [document]
    for _ in range(levels):
        layer = [inner for value in layer for inner in _inside(value)]
        if not layer:
            return False
    return True


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def read_lines(path: Path) -> list[str]:
    """Read the lines of a log, without an incomplete last one, which a killed process leaves.

    Raises:
        PlanError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise PlanError(f"{path} is no regular file")
    try:
        text = path.read_bytes()
    except OSError as fault:
        raise PlanError(f"cannot read {path}: {fault.strerror or fault}") from fault
    return text[: text.rfind(b"\n") + 1].decode("utf-8", errors="replace").splitlines()


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``, and rename that file to ``path`` on success.

    The name is unique among all nodes that share the folder.

    Raises:
        OutputError: the file cannot be written (the disk is full, say); ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text beside its target and rename it into place, so that no reader or crash ever sees half a file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a log, in place of half a line that a killed process left at its end.

    Raises:
        OutputError: the line cannot be written (the disk is full, say); the lines before it are unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
            file.write(line.encode() + b"\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def could_not_write(error: Exception) -> bool:
    """Tell whether a save failed for want of space, which torch and safetensors report by errors of their own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return (
        isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
    )


def cannot_write(path: Path, error: Exception) -> OutputError:
    """Return the error that states in one line why ``path`` was not written, and what to do."""
    why = getattr(error, "strerror", None) or str(error)
    if isinstance(error, shutil.Error):  # of many files: a list of (source, copy, reason)
        why = error.args[0][0][2]
    existing = next((folder for folder in path.parents if os.path.isdir(folder)), None)  # is_dir may raise
    if existing is not None and shutil.disk_usage(existing).free < _LITTLE:  # torch's own words do not say so
        why = os.strerror(errno.ENOSPC)
    return OutputError(f"{path} cannot be written ({why}); free space there or choose another folder, then run again")


def check_writable(folder: Path) -> str | None:
    """Return the reason why nothing can be written into ``folder``, which need not exist yet; None where it can.

    A file is written and removed, since permissions do not reveal read-only and full disks: in the folder, or in the
    nearest one above it that exists. No folder is made, so that runs that begin together do not collide.
    """
    try:
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        probe = existing / f".adaptive-{uuid.uuid4().hex}.tmp"
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        return getattr(error, "strerror", None) or str(error)
    return None


# -- digests ----------------------------------------------------------------------------------------------------------


def digest_of(value: Any) -> str:
    """Compute the SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_digests(folder: Path) -> None:
    """Store the digests of all files in ``folder`` in a file there, so that damage is found when they are read."""
    files = {str(path.relative_to(folder)): file_digest(path) for path in _files_below(folder)}
    write_atomically(folder / DIGESTS_FILE, json.dumps({"schema_version": 1, "sha256": files}, indent=1) + "\n")


def damaged_files(folder: Path) -> list[str]:
    """List the files of ``folder`` that are missing or changed since :func:`write_digests`; empty where it never ran.

    Files that were added later are ignored.

    Raises:
        PlanError: the list of digests itself cannot be read.
    """
    path = folder / DIGESTS_FILE
    if not path.is_file():
        return []
    noted = read_mapping(path, str(path)).get("sha256")
    if not isinstance(noted, dict):
        raise PlanError(f"{path} holds no digests")
    faults = []
    for name, digest in noted.items():
        file = folder / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file_digest(file) != digest:
            faults.append(f"{name} has changed since it was written")
    return faults


def note_checksum(path: Path) -> None:
    """Write the digest of a cache entry beside it; without that file the entry is not used."""
    write_atomically(_checksum_path(path), file_digest(path) + "\n")


def is_intact(path: Path) -> bool:
    """Tell whether a cache entry exists and has the digest that :func:`note_checksum` wrote."""
    try:
        return _checksum_path(path).read_text(encoding="ascii").strip() == file_digest(path)
    except (OSError, ValueError):
        return False


def usable_entry(path: Path) -> bool:
    """Tell whether a cache entry can be used; warn of a damaged one and rename it, so that it is made anew."""
    if not path.exists():
        return False
    if is_intact(path):
        return True
    aside = path.with_name(path.name + ".damaged")
    try:
        os.replace(path, aside)
        _checksum_path(path).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    logger.warning(f"{path} in the cache is damaged or was not written to its end: kept as {aside.name}, made anew")
    return False


def _checksum_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _files_below(folder: Path) -> list[Path]:
    hidden = (DIGESTS_FILE, LOCK_FILE)
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in hidden)
