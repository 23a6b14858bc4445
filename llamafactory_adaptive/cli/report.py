"""``llamafactory-adaptive report``: what runs did, and what was cut of adapters, from their files."""

import argparse
import os
from pathlib import Path

from llamafactory_adaptive.errors import refuse


def report(arguments: argparse.Namespace) -> int:
    """Print what runs did, from the files in their ``output_dir``, or write it as a page."""
    from llamafactory_adaptive.reports.run_report import (
        comparison,
        data_of_unfinished_run,
        read_run,
        run_text,
        text_of_cut_adapter,
    )

    if arguments.html is not None and os.path.lexists(arguments.html):
        refuse("--html", str(arguments.html), "it exists already, nothing was overwritten", "--html <another file>")
    others = {folder: data_of_unfinished_run(folder) or text_of_cut_adapter(folder) for folder in arguments.runs}
    runs = [read_run(folder) for folder in arguments.runs if others[folder] is None]
    texts = {str(folder): text for folder, text in others.items() if text}
    if arguments.html is not None:
        return _write_page(arguments.html, runs, texts)
    print("\n\n".join([*texts.values(), *(run_text(run) for run in runs)]))
    if len(runs) > 1:
        print("\n" + comparison(runs))
    return 0


def _write_page(path: Path, runs: list, texts: dict[str, str]) -> int:
    from llamafactory_adaptive.files import write_atomically
    from llamafactory_adaptive.reports.run_page import html_report

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, html_report(runs, texts))
    print(f"page written to {path}")
    return 0
