"""A child process that ends with its parent, however that ends, and shows only progress and warnings of its log."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from llamafactory_adaptive.launcher import CPU
from llamafactory_adaptive.progress import LINES, Followed
from llamafactory_adaptive.reports.plaintext import tell


# Set by a launcher for its workers; a process of its own is none of them.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
                       "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
                       "FORCE_TORCHRUN", "USE_RAY", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # fmt: skip
_PROGRESS = re.compile(r"Scoring modules|Held-out loss")
_SHOWN = re.compile(rf"^\[(WARNING|ERROR)\|.*llamafactory\.adaptive|{_PROGRESS.pattern}")
_EVERY_SECONDS = 15.0  # between two lines of progress where there is no terminal
_KEPT_LINES = 2000
_END_SECONDS = 10.0
_LOOK_SECONDS = 1.0  # between two checks for the end of a child whose output others hold open
_TELL_SECONDS = 600.0  # of silence between two notes to the user on what is waited for
_SILENT_SECONDS = 6 * 3600.0  # of silence, after which the child counts as hanging


def alone(device: str | None = None) -> dict[str, str]:
    """Return this process's environment for a child that no launcher started, with one device.

    Several visible devices without a launcher make the host refuse to start.

    Args:
        device: the device to see, as ``CUDA_VISIBLE_DEVICES`` names it, or ``cpu:N`` for N threads of the CPU; None
            for the first one of this process.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER_VARIABLES and not key.startswith("TORCHELASTIC_")
    }
    if device is not None and device.startswith(f"{CPU}:"):
        return {**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": device.removeprefix(f"{CPU}:")}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = visible.split(",")[0] if visible is not None else "0"
    return {**environment, "CUDA_VISIBLE_DEVICES": first if device is None else device}


def last_words(said: str) -> str:
    """Return the last line that a child printed, shortened, after a semicolon; empty if there is none."""
    lines = [line for line in said.splitlines() if line.strip()]
    return f"; its last line: {lines[-1].strip()[:300]}" if lines else ""


class Children:
    """Children whose parent waits for them in several threads, and that are ended together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[subprocess.Popen[bytes], float] = {}
        self._ended = False

    @contextmanager
    def holding(self, process: "subprocess.Popen[bytes]", patience: float = 0.0) -> Iterator[None]:
        """Count a process among the children within the context; end it at once if the others have been ended.

        Args:
            process: the child.
            patience: as for :func:`run_child`.
        """
        with self._lock:
            self._running[process] = patience
            ended = self._ended
        if ended:
            _end([(process, patience)])
        try:
            yield
        finally:
            with self._lock:
                del self._running[process]

    def end(self) -> None:
        """End all children, and those that start later."""
        with self._lock:
            self._ended, running = True, list(self._running.items())
        _end(running)


def run_child(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    job: str,
    children: Children | None = None,
    patience: float = 0.0,
) -> tuple[int, str]:
    """Run a command to its end: its output goes to ``log``, its progress and warnings to the terminal, too.

    The child holds one end of a pipe (its standard input) whose other end only this process has: when this process
    ends, by ``kill -9`` too, the child sees the pipe close and ends itself (:func:`end_with_parent`).

    Args:
        command: of a program that calls :func:`read_job`, then :func:`end_with_parent`.
        environment: all environment variables of the child.
        log: file for its output; where it cannot be written, the last lines are kept in memory alone.
        job: one line, sent to the child's standard input.
        children: through which another thread may end the child.
        patience: seconds that the child has to end by itself once its pipe is closed, before it is killed.

    Returns:
        The exit code (negative for a signal), and the last lines it printed. A child that prints nothing for six hours
        is killed.
    """
    process = _start(command, {**environment, **LINES}, stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    try:
        with (children or Children()).holding(process, patience):
            return _wait_for(process, log, job, lines)
    except subprocess.TimeoutExpired:  # it closed its output and does not end
        return -9, "\n".join(lines)
    finally:
        _end([(process, patience)])


def answer_of_child(
    command: Sequence[str], environment: Mapping[str, str], seconds: float, children: Children
) -> tuple[int, str, str]:
    """Run a command to its end, and return its exit code and what it printed to standard output and to standard error.

    Args:
        command: the command; its standard input is empty.
        environment: all environment variables of the child.
        seconds: how long it may take.
        children: through which another thread may end the child.

    Raises:
        OSError: the command cannot be started.
        TimeoutExpired: it takes longer; it was killed.
    """
    process = _start(command, environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        with children.holding(process):
            said, complained = process.communicate(timeout=seconds)
    finally:
        _end([(process, 0.0)])
    return process.returncode, said.decode(errors="replace"), complained.decode(errors="replace")


def _start(
    command: Sequence[str], environment: Mapping[str, str], stdin: int, stderr: int
) -> "subprocess.Popen[bytes]":
    """Start a child in a session of its own: Ctrl-C reaches this process alone, which then ends the child."""
    return subprocess.Popen(
        command,
        env=dict(environment),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )


def _wait_for(process: "subprocess.Popen[bytes]", log: Path, job: str, lines: "deque[str]") -> tuple[int, str]:
    assert process.stdin is not None
    with suppress(BrokenPipeError, ValueError):  # it has ended already, and its output says why, or was ended by us
        process.stdin.write(job.encode() + b"\n")
        process.stdin.flush()
    _fold(process, log, lines)
    return process.wait(_END_SECONDS), "\n".join(lines)


def _end(children: Sequence[tuple["subprocess.Popen[bytes]", float]]) -> None:
    """Close the pipes of all children at once, wait for those that have the patience, and kill what is left.

    Killed is a child's whole session: the child, and the workers of a child that was killed.
    """
    patient = [(process, patience) for process, patience in children if patience and process.poll() is None]
    for process, _ in patient:
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
    closed = time.monotonic()
    for process, patience in patient:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, closed + patience - time.monotonic()))
    for process, _ in children:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    for process, _ in children:
        with suppress(subprocess.TimeoutExpired):  # stuck inside the kernel, where no signal reaches it
            process.wait(_END_SECONDS)


def _chunks(process: "subprocess.Popen[bytes]", log: Path) -> Iterator[bytes]:
    """Yield what a child prints until it closes its output or has ended, whoever else holds that output open.

    Raises:
        TimeoutExpired: it has printed nothing for too long.
    """
    assert process.stdout is not None
    output, heard = process.stdout.fileno(), time.monotonic()
    told = heard
    while True:
        ended = process.poll() is not None
        if select.select([output], [], [], 0.0 if ended else _LOOK_SECONDS)[0]:
            if not (chunk := os.read(output, 65536)):
                return
            heard = told = time.monotonic()
            yield chunk
        elif ended:
            return
        elif time.monotonic() - heard > _SILENT_SECONDS:
            raise subprocess.TimeoutExpired(process.args, _SILENT_SECONDS)
        elif time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            silent = f"{(told - heard) / 60:.0f} minutes"
            tell(f"still waiting for process {process.pid}, which has printed nothing for {silent}; its log is {log}")


def _fold(process: "subprocess.Popen[bytes]", log: Path, lines: "deque[str]") -> None:
    """Copy what a child prints to a log and to ``lines``, and its progress and warnings to the terminal."""
    rest, told, bar = b"", 0.0, Followed()
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    try:
        for chunk in _chunks(process, log):
            with suppress(OSError), log.open("ab") as file:  # a full disk must not end the scoring
                file.write(chunk)
            *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
            for raw in whole:
                line = raw.decode("utf-8", "replace").rstrip()
                lines.append(line)
                told = _show(line, told, bar)
    finally:
        bar.remove()
    lines.append(rest.decode("utf-8", "replace").rstrip())


def _show(line: str, told: float, bar: Followed) -> float:
    """Print progress, on a terminal as a bar, or a warning; return when a line of progress was last printed."""
    if not _SHOWN.search(line):
        return told
    progress = _PROGRESS.search(line) is not None
    if progress and sys.stderr.isatty():
        bar.follow(line)
        return told
    if progress and "100%" not in line and time.monotonic() - told < _EVERY_SECONDS:
        return told
    bar.remove()
    print(line, file=sys.stderr, flush=True)
    return time.monotonic() if progress else told


def read_job() -> str:
    """Read the line that :func:`run_child` sent to this process."""
    job = b""
    while not job.endswith(b"\n") and (chunk := os.read(0, 65536)):
        job += chunk
    return job.decode()


def end_with_parent(folder: Path, patience: float = 0.0) -> None:
    """Start a thread that ends this process and its workers as soon as its parent is gone, and removes ``folder``.

    Args:
        folder: a folder that this process alone uses.
        patience: seconds that they have to end by themselves after SIGTERM, and to remove what is half written.
    """

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        shutil.rmtree(folder, ignore_errors=True)
        if os.getpgrp() == os.getpid():
            if patience:
                os.killpg(os.getpid(), signal.SIGTERM)
                time.sleep(patience)
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
