"""Locks of torch's extension builder: one whose owner was killed must not block a run for ever.

While PyTorch builds a C++ operator (DeepSpeed's CPU Adam, for example) it holds a file named ``lock``; other processes
wait for that file without a time limit and without a message. The file does not name its owner, but a build that is
alive writes into the folder of its lock.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import OutputError


QUIET_SECONDS = 900.0  # no compiler works on one file of DeepSpeed's for longer without writing
_SAY_AFTER = 15.0
logger = logging.getLogger("llamafactory.adaptive")


@contextmanager
def bounded_waits(quiet: float = QUIET_SECONDS) -> Iterator[None]:
    """Restrict the waits for another process's build within the context, and log them.

    A lock in whose folder nothing was written for ``quiet`` seconds is removed at once, and its build begins anew.

    Args:
        quiet: seconds without a write after which a build is taken to be dead.
    """
    from torch.utils.file_baton import FileBaton

    baton_class: Any = FileBaton
    try_acquire, wait = baton_class.try_acquire, baton_class.wait

    def acquire(baton: Any) -> Any:
        _remove_if_dead(Path(baton.lock_file_path), quiet)
        return try_acquire(baton)

    baton_class.try_acquire, baton_class.wait = acquire, lambda baton: _wait(Path(baton.lock_file_path), quiet)
    try:
        yield
    finally:
        baton_class.try_acquire, baton_class.wait = try_acquire, wait


def _remove_if_dead(lock: Path, quiet: float) -> None:
    if lock.exists() and (silence := _silence(lock)) > quiet:
        logger.warning(
            f"{lock} was left by a build that was broken off ({silence:.0f} s without a trace); it is removed"
        )
        lock.unlink(missing_ok=True)


def _wait(lock: Path, quiet: float, poll: float = 0.1) -> None:
    """Wait until the build that holds ``lock`` has ended.

    Raises:
        OutputError: nothing was written into the folder of the lock for ``quiet`` seconds.
    """
    started, told = time.monotonic(), False
    while lock.exists():
        time.sleep(poll)
        if not told and time.monotonic() - started > _SAY_AFTER:
            told = True
            logger.warning(f"waiting for another process that builds an operator in {lock.parent}")
        if (silence := _silence(lock)) > quiet:
            raise OutputError(
                f"waited for another process to build an operator, but nothing was written to {lock.parent} for "
                f"{silence:.0f} s: if no such process runs, delete {lock} and run again"
            )


def _silence(lock: Path) -> float:
    """Return the seconds since anything in the folder of the lock was written; 0 if that cannot be read."""
    latest = 0.0
    with suppress(OSError):
        for entry in os.scandir(lock.parent):
            with suppress(OSError):
                latest = max(latest, entry.stat().st_mtime)
    return time.time() - latest if latest else 0.0
