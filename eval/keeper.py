"""Runs one command in a process group of its own and ends the whole group when its own standard input closes.

Run: ``python keeper.py GRACE_SECONDS COMMAND ...`` with a pipe for standard input. Whoever holds the other end of the
pipe may end in any way, kill -9 included: the pipe closes with it and no server is left behind. What the command says
passes through here, so that a secret of the environment is in no log. Standard library only.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


_LONGEST_LINE = 2**16
_DRAIN_SECONDS = 5.0  # for the last words of a command whose output others still hold open


def end_group(group: int, grace: float) -> None:
    """Ask every process of a group to end, and kill what is left after ``grace`` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # raises once the group is empty
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def keep(command: list[str], grace: float, clean: Callable[[str], str]) -> int:
    """Run ``command`` to its end or to the end of standard input; its output goes line by line through ``clean``.

    Returns:
        Its exit code, 128 + N when signal N ended it, as a shell says it.
    """
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **pipe)  # type: ignore[call-overload]

    def watch() -> None:
        while os.read(0, 4096):
            pass
        end_group(child.pid, grace)

    threading.Thread(target=watch, daemon=True).start()
    passing = threading.Thread(target=pass_on, args=(child.stdout, clean), daemon=True)
    passing.start()
    code: int = child.wait()
    end_group(child.pid, grace)  # a server that crashed may leave its engine processes
    passing.join(_DRAIN_SECONDS)
    return code if code >= 0 else 128 - code


def pass_on(source: BinaryIO, clean: Callable[[str], str]) -> None:
    """Copy cleaned lines to standard output; go on reading when they cannot be written, or the command would wait."""
    while line := source.readline(_LONGEST_LINE):
        with contextlib.suppress(OSError):
            os.write(1, clean(line.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape"))


def main() -> int:
    """Run what the command line says. The pipe alone decides about the end; handlers are not inherited, SIG_IGN is."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this file is run by its path
    from eval.redaction import clean

    return keep(sys.argv[2:], float(sys.argv[1]), clean)


if __name__ == "__main__":
    sys.exit(main())
