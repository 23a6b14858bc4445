"""Runs one command in a process group of its own and ends the whole group when its own standard input closes.

Run: ``python keeper.py GRACE_SECONDS COMMAND ...`` with a pipe for standard input. Whoever holds the other end of the
pipe may end in any way, kill -9 included: the pipe closes with it and no server is left behind. Standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time


def end_group(group: int, grace: float) -> None:
    """Ask every process of a group to end, and kill what is left after ``grace`` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # raises once the group is empty
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def keep(command: list[str], grace: float) -> int:
    """Run ``command`` to its end or to the end of standard input.

    Returns:
        Its exit code, 128 + N when signal N ended it, as a shell says it.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        end_group(child.pid, grace)

    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    end_group(child.pid, grace)  # a server that crashed may leave its engine processes
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    # The pipe alone decides. Handlers, unlike SIG_IGN, are not inherited by the command.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    sys.exit(keep(sys.argv[2:], float(sys.argv[1])))
