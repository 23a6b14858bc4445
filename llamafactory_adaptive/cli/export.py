"""``llamafactory-adaptive export``: a saved adapter in the layout that a server reads, with a certificate."""

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llamafactory_adaptive.export.request import export_request
from llamafactory_adaptive.reports.plaintext import plain_lines


def export(arguments: argparse.Namespace) -> int:
    """Write a saved adapter in a server's layout and certify it; needs neither the hook nor LLaMA-Factory."""
    request = export_request(arguments)
    from llamafactory_adaptive.export.exporter import run_export

    with _signals_end_in_order():
        print(plain_lines(run_export(request)))
    return 0


@contextmanager
def _signals_end_in_order() -> Iterator[None]:
    """Raise SystemExit on SIGTERM and SIGHUP within the context, so that half-written files are removed."""

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not cut the cleaning up short
        raise SystemExit(128 + number)

    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]  # not under nohup
    try:
        for number in ours:
            signal.signal(number, end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
