"""Scripts that tests start by their path, and which processes run: tests assert that none is left behind."""

import os
import time
from collections.abc import Iterable
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
EVAL_DRIVER = Path(__file__).with_name("eval_driver.py")
FAKE_SERVER = Path(__file__).with_name("fake_server.py")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not collected does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ended(pids: Iterable[int], seconds: float = 30.0) -> None:
    """Fail if one still runs after ``seconds``: signals arrive a moment after they are sent."""
    deadline = time.monotonic() + seconds
    for pid in pids:
        while alive(pid):
            assert time.monotonic() < deadline, f"process {pid} still runs"
            time.sleep(0.01)


def processes_naming(text: str) -> list[int]:
    """Ids of other processes whose command line holds ``text``."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in words and int(folder.name) != os.getpid() and alive(int(folder.name)):
            pids.append(int(folder.name))
    return pids
