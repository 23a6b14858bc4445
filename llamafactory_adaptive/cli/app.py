"""Command line: ``llamafactory-adaptive plan | train | report | export | doctor | init``.

Exit codes: 0 done, 2 user error (one message on stderr, no traceback), 1 a bug.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.cli.doctor import doctor
from llamafactory_adaptive.cli.examples import init
from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.cli.parser import MEASURE, parse_command_line
from llamafactory_adaptive.cli.plan import plan
from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.export.request import export_request
from llamafactory_adaptive.reports.plaintext import plain_lines, tell


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parse_command_line(argv)
    handlers = {
        "plan": plan, "train": train, "report": report, "export": export, "doctor": doctor, "init": init,
        MEASURE: measure,
    }  # fmt: skip
    try:
        return handlers[arguments.command](arguments)
    except AdaptiveError as error:
        tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("\nllamafactory-adaptive: interrupted", file=sys.stderr)
        return 130


def train(arguments: argparse.Namespace) -> int:
    """Run LLaMA-Factory's launcher, with the hook in place here and in every torchrun worker."""
    require_enabled()
    from llamafactory_adaptive.bridge.arguments import check_config_file

    check_config_file(arguments.config)
    tell(f"training {arguments.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    sys.argv = ["llamafactory-cli", "train", str(arguments.config), *arguments.overrides]
    from llamafactory import launcher

    launcher.__file__ = str(Path(_bootstrap.__file__).resolve())  # the file torchrun is told to run
    launcher.launch()
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Print what runs did, from the files in their ``output_dir``."""
    from llamafactory_adaptive.reports.run_report import comparison, data_of_unfinished_run, read_run, run_text

    unfinished = {folder: data_of_unfinished_run(folder) for folder in arguments.runs}
    runs = [read_run(folder) for folder in arguments.runs if unfinished[folder] is None]
    print("\n\n".join([*(text for text in unfinished.values() if text), *(run_text(run) for run in runs)]))
    if len(runs) > 1:
        print("\n" + comparison(runs))
    return 0


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


def measure(arguments: argparse.Namespace) -> int:
    """Run the measurement whose job is a line of standard input; write a user error to the answer file."""
    require_enabled()
    from llamafactory_adaptive.bridge.child import end_with_parent, read_job
    from llamafactory_adaptive.bridge.measure_process import run_measurement_job
    from llamafactory_adaptive.bridge.scoring_job import ScoringJob

    job = ScoringJob.from_json(read_job())
    end_with_parent(arguments.answer.parent)
    try:
        run_measurement_job(job)
    except AdaptiveError as error:
        arguments.answer.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return 2
    return 0
