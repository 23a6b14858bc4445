"""Locks of torch's extension builder: one whose owner was killed must not hold up a run for ever.

PyTorch builds C++ operators (DeepSpeed's CPU Adam, say) under a file named ``lock`` and waits for such a file without
a limit and without a word. The file does not say whose it is, but a build leaves traces: it writes into its folder.
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
    """Within the context waiting for another process's build has a limit and is told of.

    A lock in whose folder nothing was written for ``quiet`` seconds is removed at once, and its build begins anew.

    Args:
        quiet: seconds without a trace after which a build is taken to be dead.
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
    """Wait until a build has ended.

    Raises:
        OutputError: it shows no sign of life for ``quiet`` seconds.
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
    """Seconds since anything in the lock's folder was written."""
    latest = 0.0
    with suppress(OSError):
        for entry in os.scandir(lock.parent):
            with suppress(OSError):
                latest = max(latest, entry.stat().st_mtime)
    return time.time() - latest if latest else 0.0
