"""Commands of this package that the board runs as processes: one at a time, ended on request or after a time limit."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


_LOOK_SECONDS = 1.0
_END_SECONDS = 10.0  # that a process has to end in order, before it is killed
_SHOWN_CHARACTERS = 20_000
LONGEST_HOURS = 2


class BusyError(RuntimeError):
    """Another command of the board is running."""


@dataclass(frozen=True)
class Progress:
    """What a command has printed so far, and how it ended.

    Attributes:
        seconds: since it was started.
        said: the end of its standard output.
        complained: the end of its standard error.
        code: its exit code; None while it runs.
        ended: ``aborted`` or ``too_long`` where it was ended, else empty.
    """

    seconds: int
    said: str
    complained: str
    code: int | None = None
    ended: str = ""


class Command:
    """The one command that a board may run at a time."""

    def __init__(self, longest: float = LONGEST_HOURS * 3600.0) -> None:
        self.longest = longest
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = ""

    @property
    def busy(self) -> bool:
        """Tell whether a command is running."""
        return self._lock.locked()

    def run(self, words: Sequence[str]) -> Iterator[Progress]:
        """Run a command line of this package, and yield what it has printed, once a second and at its end.

        The command ends with the loop over it: where that is given up, so is the command.

        Args:
            words: the words after ``llamafactory-adaptive``.

        Raises:
            BusyError: another command is running.
        """
        with self._alone(), TemporaryDirectory(prefix="adaptive-board-") as folder:
            said, complained = Path(folder) / "out", Path(folder) / "err"
            with said.open("wb") as out, complained.open("wb") as err:
                process = _start(folder, words, out.fileno(), err.fileno())
            started, self._process = time.monotonic(), process
            try:
                while process.poll() is None:
                    yield Progress(_since(started), _tail(said), _tail(complained))
                    self._wait(process, started)
            finally:
                self._process = None
                _end(process)
            yield Progress(_since(started), _tail(said), _tail(complained), process.returncode, self._ended)

    def abort(self, reason: str = "aborted") -> None:
        """Ask the command to end; it is killed if it does not."""
        if (process := self._process) is not None:
            self._ended = reason
            _signal(process, signal.SIGTERM)

    def close(self) -> None:
        """End the command before this process ends, and kill it if it does not."""
        self.abort()
        if (process := self._process) is not None:
            _end(process)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise BusyError
        self._ended = ""
        try:
            yield
        finally:
            self._lock.release()

    def _wait(self, process: "subprocess.Popen[bytes]", started: float) -> None:
        """Wait a second for the end, and end what was aborted or takes too long."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_SECONDS)
        if process.poll() is None and not self._ended and time.monotonic() - started > self.longest:
            self.abort("too_long")
        if process.poll() is None and self._ended:
            _end(process)


def _start(folder: str, words: Sequence[str], out: int, err: int) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own, so that its own processes end with it.

    It watches the pipe of its standard input, which closes with this process, by ``kill -9`` too.

    Args:
        folder: that of its output, which it removes if this process cannot.
        words: those of the command.
        out, err: where its output goes.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "llamafactory_adaptive.cli.board_command", folder, str(_END_SECONDS), *words],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.PIPE,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command that still runs: by a signal that it can act on, and then by one that it cannot."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_END_SECONDS)
    _signal(process, signal.SIGKILL)  # what it may have left behind, too
    if process.stdin is not None:
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):  # stuck inside the kernel, where no signal reaches it
        process.wait(_END_SECONDS)


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _since(started: float) -> int:
    return round(time.monotonic() - started)


def _tail(path: Path) -> str:
    """Return the end of a file of output; of a line that was written over, as progress bars are, the last state."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _SHOWN_CHARACTERS))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(line for line in lines if line.strip())
