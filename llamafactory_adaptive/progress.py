"""Progress of long work on standard error: a bar on a terminal, nothing where it is piped.

A process that works for another, which reads what it prints, writes lines instead: a percentage at most once a second.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, TypeVar


Item = TypeVar("Item", covariant=True)
LINES = {"LLAMAFACTORY_ADAPTIVE_PROGRESS": "lines"}  # in the environment of a process that works for another
_LINE_SECONDS = 1.0
_LINE = re.compile(r"^(.+): \d+% \((\d+)/(\d+)\)$")  # as they are printed below


class Counted(Protocol[Item]):
    """Items whose number is known before they are passed through."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Item]: ...


def watched(items: Counted[Item], what: str, quiet: bool = False) -> Iterator[Item]:
    """Yield ``items``, with the progress through them shown; arguments as in :func:`progress`."""
    with progress(what, len(items), quiet) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Print progress within the context, and yield what moves it on by one.

    Args:
        what: the work, as text beside the bar.
        total: how many pieces of it there are.
        quiet: whether nothing is shown, wherever it is.
    """
    if quiet:
        yield lambda: None
    elif os.environ.items() >= LINES.items():
        yield _Lines(what, total).advance
    elif not sys.stderr.isatty():
        yield lambda: None
    else:
        with _bar(what, total) as advance:
            yield advance


class _Lines:
    """Lines of progress for another process; the last one says 100%."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done, self.told = what, total, 0, 0.0

    def advance(self) -> None:
        """Count one more piece of work, and print a line if it is the last, or none was printed for a second."""
        self.done += 1
        if self.done == self.total or time.monotonic() - self.told >= _LINE_SECONDS:
            self.told = time.monotonic()
            words = f"{self.what}: {100 * self.done // self.total}% ({self.done}/{self.total})"
            print(words, file=sys.stderr, flush=True)


class Followed:
    """A bar on this process's terminal that follows the lines of progress of another process."""

    def __init__(self) -> None:
        self._open, self._what, self._done = ExitStack(), "", 0
        self._advance: Callable[[], None] = lambda: None

    def follow(self, line: str) -> None:
        """Move the bar to where a line of progress says, and remove it at its end; other lines are left out."""
        if (found := _LINE.search(line)) is None:
            return
        what, done, total = found[1], int(found[2]), int(found[3])
        if what != self._what or done < self._done:
            self.remove()
            self._what, self._advance = what, self._open.enter_context(_bar(what, total))
        while self._done < done:
            self._done += 1
            self._advance()
        if done >= total:
            self.remove()

    def remove(self) -> None:
        """Remove the bar, so that others can print; the next line of progress brings it back."""
        self._open.close()
        self._what, self._done = "", 0


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Streams are left alone: the host's log handlers hold them, and lines would be torn.
    with Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
