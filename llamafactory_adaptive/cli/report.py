"""``llamafactory-adaptive report``: what runs did, and what was cut of adapters, from their files."""

import argparse


def report(arguments: argparse.Namespace) -> int:
    """Print what runs did, from the files in their ``output_dir``."""
    from llamafactory_adaptive.reports.run_report import (
        comparison,
        data_of_unfinished_run,
        read_run,
        run_text,
        text_of_cut_adapter,
    )

    others = {folder: data_of_unfinished_run(folder) or text_of_cut_adapter(folder) for folder in arguments.runs}
    runs = [read_run(folder) for folder in arguments.runs if others[folder] is None]
    print("\n\n".join([*(text for text in others.values() if text), *(run_text(run) for run in runs)]))
    if len(runs) > 1:
        print("\n" + comparison(runs))
    return 0
