"""Program that runs one command in a process group of its own, and ends the group when standard input closes.

Run: ``python keeper.py GRACE_SECONDS COMMAND ...`` with a pipe for standard input. However the process at the other
end of the pipe ends, kill -9 included, the pipe closes with it and no server is left behind. The command's output
passes through this program, so that no secret of the environment is logged. Standard library only.
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
_DRAIN_SECONDS = 5.0  # wait for the last output of a command whose pipe another process still holds open


def end_group(group: int, grace: float) -> None:
    """Terminate every process of a group, and kill those that are left after ``grace`` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline:
            os.killpg(group, 0)  # raises once the group is empty
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def keep(command: list[str], grace: float, clean: Callable[[str], str]) -> int:
    """Run ``command`` until it ends or standard input closes; its output goes line by line through ``clean``.

    Returns:
        Its exit code, or 128 + N when signal N ended it, as in a shell.
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
    """Copy cleaned lines to standard output.

    Lines that cannot be written are read all the same, as the command would block otherwise.
    """
    while line := source.readline(_LONGEST_LINE):
        with contextlib.suppress(OSError):
            os.write(1, clean(line.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape"))


def main() -> int:
    """Run the command given on the command line, and return its exit code.

    SIGINT, SIGTERM and SIGHUP do nothing here: the closed pipe alone ends the command. They have a handler because
    ignored signals (SIG_IGN) would be inherited by the command, and handlers are not.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this file is run by its path
    from eval.redaction import clean

    return keep(sys.argv[2:], float(sys.argv[1]), clean)


if __name__ == "__main__":
    sys.exit(main())
