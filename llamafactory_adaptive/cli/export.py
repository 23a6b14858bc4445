"""``llamafactory-adaptive export``: a saved adapter in the layout that a server reads, with a certificate."""

import argparse

from llamafactory_adaptive.cli.signals import signals_end_in_order
from llamafactory_adaptive.export.request import export_request
from llamafactory_adaptive.reports.plaintext import plain_lines


def export(arguments: argparse.Namespace) -> int:
    """Write a saved adapter in a server's layout and certify it; needs neither the hook nor LLaMA-Factory."""
    request = export_request(arguments)
    from llamafactory_adaptive.export.exporter import run_export

    with signals_end_in_order():
        print(plain_lines(run_export(request)))
    return 0
