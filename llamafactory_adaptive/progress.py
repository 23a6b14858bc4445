"""Progress of long work on standard error: a bar on a terminal, nothing where it is piped."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """Show a bar within the context, and yield what moves it on by one.

    Args:
        what: the work, as text beside the bar.
        total: how many pieces of it there are.
        quiet: whether nothing is shown on a terminal, either.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Streams are left alone: the host's log handlers hold them, and would be torn.
    streams = {"redirect_stdout": False, "redirect_stderr": False}
    with Progress(*columns, console=Console(stderr=True), transient=True, **streams) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
