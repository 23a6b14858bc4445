"""What Python imports at its start where this folder is on its path: of a job, rank 1 of the first try is killed.

That happens at some moment after the checkpoint that ``KILL_AFTER`` names has been written.
"""

import os
import signal
import threading
import time
from pathlib import Path


def _kill_after(marker: Path) -> None:
    while not marker.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


if "LOCAL_RANK" in os.environ and "KILL_AFTER" in os.environ:
    from tests.helpers.cpu_devices import read_numbered_cpus

    read_numbered_cpus()
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        threading.Thread(target=_kill_after, args=(Path(os.environ["KILL_AFTER"]),), daemon=True).start()
