"""A child process that ends with its parent, however that ends, and whose log is shown only when it matters."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO


_SHOWN = re.compile(r"^\[(WARNING|ERROR)\|.*llamafactory\.adaptive|Scoring modules")
_EVERY_SECONDS = 15.0  # progress where nobody watches a terminal
_KEPT_LINES = 2000
_END_SECONDS = 10.0


def run_child(command: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[int, str]:
    """Run a command to its end; what it prints goes to ``log``, its progress and warnings to the terminal too.

    The child holds one end of a pipe (its standard input) whose other end only this process has: when this process
    ends, by ``kill -9`` too, the child sees the pipe close and ends itself (:func:`end_with_parent`).

    Args:
        command: of a program that calls :func:`end_with_parent`.
        environment: all of it.
        log: file for its output; where it cannot be written, the last lines are kept in memory alone.

    Returns:
        The exit code (negative for a signal), and the last lines it printed.
    """
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
    )
    assert process.stdout is not None
    try:
        lines = _fold(process.stdout, log)
        return process.wait(_END_SECONDS), "\n".join(lines)
    except subprocess.TimeoutExpired:  # it closed its output and does not end
        return -9, "\n".join(lines)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _fold(stream: IO[bytes], log: Path) -> "deque[str]":
    """Copy a stream into a log and the part of it that a person should see to the terminal."""
    lines: deque[str] = deque(maxlen=_KEPT_LINES)
    rest, told = b"", 0.0
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
    while chunk := os.read(stream.fileno(), 65536):
        with suppress(OSError), log.open("ab") as file:  # a full disk must not end the scoring
            file.write(chunk)
        *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
        for raw in whole:
            line = raw.decode("utf-8", "replace").rstrip()
            lines.append(line)
            told = _show(line, told)
    lines.append(rest.decode("utf-8", "replace").rstrip())
    return lines


def _show(line: str, told: float) -> float:
    """Pass on a line that matters; returns when progress was shown last."""
    if not _SHOWN.search(line):
        return told
    progress = "Scoring modules" in line
    if progress and sys.stderr.isatty():
        print(f"\r{line}", end="\n" if "100%" in line else "", file=sys.stderr, flush=True)
        return told
    if progress and "100%" not in line and time.monotonic() - told < _EVERY_SECONDS:
        return told
    print(line, file=sys.stderr, flush=True)
    return time.monotonic() if progress else told


def end_with_parent(folder: Path) -> None:
    """Have this process end as soon as its parent is gone, and remove ``folder``, which nobody else will."""

    def watch() -> None:
        with suppress(OSError):
            while os.read(0, 4096):
                pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
