"""``llamafactory-adaptive report``: what runs did, and what was cut of adapters, from their files."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory_adaptive.cli.json_output import print_json
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.files import write_atomically


if TYPE_CHECKING:
    from llamafactory_adaptive.reports.run_report import Run


def report(arguments: argparse.Namespace) -> int:
    """Print what runs did, from the files in their ``output_dir``, or write it as a page."""
    from llamafactory_adaptive.reports.run_document import report_document
    from llamafactory_adaptive.reports.run_report import data_of_unfinished_run, read_run, text_of_cut_adapter

    page: Path | None = arguments.html
    if page is not None and os.path.lexists(page):
        refuse("--html", str(page), "it exists already, nothing was overwritten", "--html <another file>")
    others = {folder: data_of_unfinished_run(folder) or text_of_cut_adapter(folder) for folder in arguments.runs}
    runs = [read_run(folder) for folder in arguments.runs if others[folder] is None]
    texts = {str(folder): text for folder, text in others.items() if text}
    if page is not None:
        _write_page(page, runs, texts)
    if arguments.json:
        print_json({**report_document(runs), "others": texts, "page": None if page is None else str(page)})
    elif page is not None:
        print(f"page written to {page}; open it in any browser")
    else:
        _print_runs(runs, list(texts.values()))
    return 0


def _print_runs(runs: "Sequence[Run]", texts: Sequence[str]) -> None:
    from llamafactory_adaptive.reports.run_report import (
        NOISE,
        comparison,
        comparison_rows,
        method_rows,
        run_text,
        texts_below_ranks,
    )
    from llamafactory_adaptive.reports.terminal import on_terminal, print_plan, print_rows

    if not on_terminal():
        print("\n\n".join([*texts, *(run_text(run) for run in runs)]))
        if len(runs) > 1:
            print("\n" + comparison(runs))
        return
    for text in texts:
        print(text, end="\n\n")
    for run in runs:
        print(run.folder)
        print_plan(run.plan)
        print("", *texts_below_ranks(run), "", sep="\n")
    if len(runs) > 1:
        print_rows(comparison_rows(runs))
        print_rows(method_rows(runs))
        print(NOISE)


def _write_page(path: Path, runs: "Sequence[Run]", texts: Mapping[str, str]) -> None:
    from llamafactory_adaptive.reports.run_page import html_report

    text = html_report(runs, texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
