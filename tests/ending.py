"""Waiting for other processes to be gone: signals arrive a moment after they are sent."""

import time
from collections.abc import Iterable
from pathlib import Path


def wait_until_ended(pids: Iterable[int], seconds: float = 30.0) -> None:
    """Fail if one still runs after ``seconds``; one that ended and was not collected does not count."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        while not _ended(pid):
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.01)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
