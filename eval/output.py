"""The output folder of a run: locked while it runs, claimed by one request, and written only through this module."""

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from eval import results
from eval.cache import ANSWERS_FILE
from eval.errors import EvalError
from eval.own_files import NotOurFileError, open_own
from eval.reading import read_object
from eval.redaction import clean_values
from eval.results import RESULTS_FILE


STATE_FILE = "eval_run.json"
LOCK_FILE = "eval_run.lock"
STATE_VERSION = 1
# Files that a run may leave. Where there is one and no state file, it is of an unknown run.
_OURS = ("eval_*", ANSWERS_FILE, "samples*.jsonl", "samples*.html")


class OutputFolder:
    """One run's folder as a context manager: no other run can use it meanwhile.

    The lock is the kernel's (``flock``): it is released however its process ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None
        self._state: dict[str, Any] = {}
        self._appended: set[str] = set()

    def __enter__(self) -> "OutputFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / LOCK_FILE)
        except NotOurFileError as error:
            raise EvalError(f"--out: {error.filename}: {error.strerror}, or give another folder") from error
        except OSError as error:
            raise EvalError(f"--out: {self.path} cannot be made ({error.strerror}); give another folder") from error
        return self

    def __exit__(self, *_: object) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            if _holds(lock, self.path / LOCK_FILE):
                (self.path / LOCK_FILE).unlink()
            lock.close()

    def claim(self, settings: Mapping[str, Any]) -> bool:
        """Claim the folder for the request with these settings; return whether an unfinished run of it is resumed.

        Raises:
            EvalError: the folder holds another request's run, or a finished one.
        """
        requested = json.loads(json.dumps(clean_values(dict(settings)), default=str))
        if (problem := problem_with(self.path)) is not None:
            raise EvalError(problem)
        state = _state_of(self.path)
        if state is None:
            self._write_state(requested, complete=False)
            return False
        if different := sorted(
            k for k in {*state["settings"], *requested} if state["settings"].get(k) != requested.get(k)
        ):
            raise EvalError(
                f"--out: {self.path} holds another run that was not finished; it differs in {', '.join(different)}. "
                "Give the command that began it to go on, or another folder"
            )
        self._state = state
        for pattern in _OURS:
            for scratch in self.path.glob(f".{pattern.removesuffix('*')}*.[0-9]*"):  # a kill left it half written
                scratch.unlink()
        return True

    def finish(self) -> None:
        """Mark the run as complete: from now on the folder is only read."""
        self._write_state(self._state["settings"], complete=True)

    def write_text(self, name: str, text: str) -> None:
        """Write one text file atomically, cleaned of secrets."""
        self._write(name, lambda path: results.write_atomically(path, text))

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Write one JSON document atomically, cleaned of secrets."""
        self._write(name, lambda path: results.write_json(path, document))

    def write_picture(self, name: str, save: Callable[[Path], None]) -> None:
        """Write a picture atomically: ``save`` gets the path of a temporary file."""

        def save_atomically(path: Path) -> None:
            scratch = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
            save(scratch)
            scratch.replace(path)

        self._write(name, save_atomically)

    def append(self, name: str, documents: Iterable[Mapping[str, Any]]) -> None:
        """Append JSON lines to a file, which is emptied by the first call of this run."""

        def add(path: Path) -> None:
            lines = [json.dumps(clean_values(dict(d)), ensure_ascii=False) + "\n" for d in documents]
            begin = os.O_APPEND if name in self._appended else os.O_TRUNC
            with open_own(
                path, os.O_WRONLY | os.O_CREAT | begin, "w", encoding="utf-8", errors="backslashreplace"
            ) as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())

        self._write(name, add)
        self._appended.add(name)

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file of the folder; raise EvalError with the reason when it cannot be written."""
        path = self.path / name
        self._check()
        try:
            write(path)
        except OSError as error:
            raise EvalError(
                f"{path} cannot be written ({error.strerror or error}); answers are kept in "
                f"{self.path / ANSWERS_FILE}: make room and give the same command again"
            ) from error

    def _check(self) -> None:
        """Raise EvalError when the folder is no longer this run's: removed, or claimed by another run, say."""
        if self._lock is None or not _holds(self._lock, self.path / LOCK_FILE):
            raise EvalError(f"--out: {self.path} was taken away or replaced meanwhile; nothing more is written there")
        if self._state and _state_of(self.path) != self._state:
            raise EvalError(
                f"--out: {self.path / STATE_FILE} was changed by another run; nothing more is written there"
            )

    def _write_state(self, settings: Mapping[str, Any], *, complete: bool) -> None:
        state = {"schema_version": STATE_VERSION, "complete": complete, "settings": dict(settings)}
        self.write_json(STATE_FILE, state)
        self._state = _state_of(self.path) or state


def problem_with(path: Path) -> str | None:
    """Describe why a folder cannot take a run; None when it can.

    It may be a file, or hold finished results or files of an unknown run.
    """
    try:
        if path.exists() and not path.is_dir():
            return f"--out: {path} is a file; give a folder"
        if odd := [name for name in leftovers(path, lock=True) if not _plain(path / name)]:
            return f"--out: {path / odd[0]} is no regular file but a pipe or a device; give another folder"
        state = _state_of(path)
    except OSError as error:
        return f"--out: {error.filename or path} cannot be read ({error.strerror}); give another folder"
    except EvalError as error:
        return str(error)
    if state["complete"] if state else (path / RESULTS_FILE).exists():
        return f"--out: {path} holds results already, nothing was overwritten; try another folder"
    if state is None and (left := leftovers(path)):
        return f"--out: {path} holds {', '.join(left[:3])} of another run; move them away or give another folder"
    return None


def leftovers(path: Path, lock: bool = False) -> list[str]:
    """List the files of a folder that a run may have left, without its lock file unless ``lock`` is set."""
    names = {file.name for pattern in _OURS for file in path.glob(pattern)}
    return sorted(names - (set() if lock else {LOCK_FILE}))


def _plain(path: Path) -> bool:
    """Tell whether a path is a file, a folder or nothing: no pipe, socket or device."""
    return path.is_file() or path.is_dir() or not path.exists()


def _state_of(path: Path) -> dict[str, Any] | None:
    file = path / STATE_FILE
    if not file.exists():
        return None
    try:
        state = read_object(file)
        if state["schema_version"] == STATE_VERSION and isinstance(state["settings"], dict):
            return {
                "schema_version": STATE_VERSION,
                "complete": bool(state["complete"]),
                "settings": state["settings"],
            }
    except (EvalError, KeyError):
        pass
    raise EvalError(f"--out: {file} cannot be read or is of another version; give another folder")


def _locked(path: Path) -> IO[bytes]:
    """Open the lock file and lock it.

    Raises:
        EvalError: another process holds the lock.
        OSError: the file cannot be opened, or its file system has no locks.
    """
    for _ in range(10):  # the process that held it may remove the file between our opening and our locking
        file = open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read(300).decode("utf-8", "replace").strip() or "another process"
            file.close()
            raise EvalError(
                f"--out: {path.parent} is in use by {owner}; wait until it has ended, or give another folder"
            ) from error
        if _holds(file, path):
            file.truncate(0)
            start = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {platform.node()}, since {start}\n".encode())
            file.flush()
            return file
        file.close()
    raise EvalError(f"--out: {path.parent} is in use by runs that come and go; give another folder")


def _holds(lock: IO[bytes], path: Path) -> bool:
    """Tell whether the locked file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except OSError:
        return False
