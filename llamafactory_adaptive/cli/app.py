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

from llamafactory_adaptive import __version__, _bootstrap
from llamafactory_adaptive.cli.doctor import doctor
from llamafactory_adaptive.cli.examples import init
from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.cli.plan import plan
from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.export.request import add_export_arguments, export_request
from llamafactory_adaptive.paths import path_argument
from llamafactory_adaptive.reports.plaintext import plain_lines, tell


def build_parser() -> argparse.ArgumentParser:
    """The command line; CFG.yaml is a LLaMA-Factory training YAML, overrides are ``key=value`` as upstream."""
    parser = argparse.ArgumentParser(prog="llamafactory-adaptive", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="show and write the ranks a run would train; trains nothing")
    plan.add_argument("--out", type=path_argument, help="folder for plan and heat-map (default: output_dir)")
    train = commands.add_parser(
        "train", help="same as llamafactory-cli train, also where the start-up hook is missing"
    )
    for command in (plan, train):
        command.add_argument("config", type=path_argument, metavar="CFG.yaml", help="a LLaMA-Factory training YAML")
        command.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings over those of the file, e.g. lora_rank=16"
        )
    report = commands.add_parser(
        "report", help="ranks, losses and training data of finished runs; two or more: compared"
    )
    report.add_argument("runs", type=path_argument, nargs="+", metavar="OUTPUT_DIR")
    add_export_arguments(
        commands.add_parser("export", help="lay an adapter out for a server, with a parity certificate")
    )
    commands.add_parser("doctor", help="say whether the hook is active, the versions, and whether each seam fits")
    init = commands.add_parser("init", help="copy the example YAMLs")
    init.add_argument("folder", type=path_argument, nargs="?", default=Path(), help="where to put examples/")
    measure = commands.add_parser("measure")  # internal: the process that `plan` and `train` score in
    measure.add_argument("answer", type=Path)
    return parser


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """Parse, with overrides allowed on either side of options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognised: {' '.join(stray or rest)}; overrides are written key=value")
    if rest:
        arguments.overrides += rest
    if bare := [word for word in getattr(arguments, "overrides", []) if "=" not in word]:
        parser.error(f"{' '.join(bare)}: overrides are written key=value, e.g. lora_rank=16")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = parse_command_line(argv)
    handlers = {
        "plan": plan, "train": train, "report": report, "export": export, "doctor": doctor, "init": init,
        "measure": measure,
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
    """Hand over to LLaMA-Factory's launcher with the hook in place here and in every torchrun worker."""
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
    """Tell what runs did, from the files in their ``output_dir``."""
    from llamafactory_adaptive.reports.run_report import comparison, data_of_unfinished_run, read_run, run_text

    unfinished = {folder: data_of_unfinished_run(folder) for folder in arguments.runs}
    runs = [read_run(folder) for folder in arguments.runs if unfinished[folder] is None]
    print("\n\n".join([*(text for text in unfinished.values() if text), *(run_text(run) for run in runs)]))
    if len(runs) > 1:
        print("\n" + comparison(runs))
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Lay a saved adapter out for a server and certify it; needs neither the hook nor LLaMA-Factory."""
    request = export_request(arguments)
    from llamafactory_adaptive.export.exporter import run_export

    with _signals_end_in_order():
        print(plain_lines(run_export(request)))
    return 0


@contextmanager
def _signals_end_in_order() -> Iterator[None]:
    """Within the context SIGTERM and SIGHUP end the program as an exception does: what is half-written is removed."""

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
    """Body of the measuring process: the job is a line of its input, its answer file carries a user error back."""
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
