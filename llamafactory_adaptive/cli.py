"""Command line: ``llamafactory-adaptive plan | train | report | export | doctor | init``.

Exit codes: 0 done, 2 user error (one message on stderr, no traceback), 1 a bug.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path
from typing import Any

from llamafactory_adaptive import __version__, _bootstrap
from llamafactory_adaptive.config import AdaptiveConfig
from llamafactory_adaptive.errors import AdaptiveConfigError, AdaptiveError, Problem, SeamError
from llamafactory_adaptive.export.command import add_export_arguments, export_request
from llamafactory_adaptive.fields import coerce
from llamafactory_adaptive.folders import path_argument
from llamafactory_adaptive.plaintext import plain_lines


PACKAGES = ("llamafactory", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def build_parser() -> argparse.ArgumentParser:
    """The command line; CFG.yaml is a LLaMA-Factory training YAML, overrides are ``key=value`` as upstream."""
    parser = argparse.ArgumentParser(prog="llamafactory-adaptive", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="show and write the ranks a run would train; trains nothing")
    plan.add_argument("--out", type=path_argument, help="folder for plan and heat-map (default: output_dir)")
    train = commands.add_parser("train", help="same as llamafactory-cli train, also without the start-up hook")
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
    measure.add_argument("job", type=Path)
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
        print(f"llamafactory-adaptive: error: {plain_lines(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nllamafactory-adaptive: interrupted", file=sys.stderr)
        return 130


def _require_enabled() -> None:
    if not _bootstrap.enabled():
        raise SeamError("LLAMAFACTORY_ADAPTIVE=0 switches the plugin off; unset it")
    _bootstrap.install()


def plan(arguments: argparse.Namespace) -> int:
    """Plan ranks without training: table, heat-map, ``adaptive_rank_plan.json``."""
    _require_enabled()
    from llamafactory_adaptive.adapter import ADAPTER_WEIGHTS
    from llamafactory_adaptive.bridge.arguments import asks_for_adaptive, check_config_file, command_line_settings
    from llamafactory_adaptive.bridge.host_check import check_folder, check_host_settings
    from llamafactory_adaptive.bridge.plans import advice, fresh_plan
    from llamafactory_adaptive.bridge.seams import require_seams
    from llamafactory_adaptive.bridge.validation import parse_config
    from llamafactory_adaptive.files import PLAN_FILE
    from llamafactory_adaptive.folder_lock import locked
    from llamafactory_adaptive.report import HEATMAP_FILE, rank_table, save_heatmap

    require_seams()
    check_config_file(arguments.config)
    sys.argv = ["llamafactory-adaptive", str(arguments.config), *arguments.overrides]
    args = command_line_settings()
    if not asks_for_adaptive(args):
        problem = Problem("finetuning_type", args.get("finetuning_type", "lora"), "there are no ranks to plan",
                          "finetuning_type: adaptive")  # fmt: skip
        raise AdaptiveConfigError([problem])
    config = parse_config(args)
    check_host_settings(args)
    if config.course is not None:
        return _plan_of_a_dynamic_run(args, config)
    started = time.perf_counter()
    folder = arguments.out or Path(args["output_dir"])
    if arguments.out is None and (folder / ADAPTER_WEIGHTS).is_file():
        raise AdaptiveConfigError(
            [Problem("output_dir", str(folder), "it holds a trained adapter with its plan", "--out <another folder>")]
        )
    check_folder("output_dir" if arguments.out is None else "--out", folder)
    with locked(folder):
        found = fresh_plan(args, config)
        found.save(folder / PLAN_FILE)
        save_heatmap(found, folder / HEATMAP_FILE)
    print(rank_table(found))
    for line in advice(found, config):
        print(f"warning: {line}")
    print(f"plan and heat-map written to {folder} in {time.perf_counter() - started:.1f} s; nothing was trained")
    return 0


def _plan_of_a_dynamic_run(args: dict[str, Any], config: AdaptiveConfig) -> int:
    """What can be said before training: the start, and the budget over the share of the steps."""
    from llamafactory_adaptive.bridge.loading import estimated_steps
    from llamafactory_adaptive.bridge.plans import fresh_plan
    from llamafactory_adaptive.report import schedule_table, totals
    from llamafactory_adaptive.schedule import Schedule, make_schedule, short_run_warning

    assert config.course is not None
    start = fresh_plan(args, config)
    budget, kind = start.budget(), start.budget_kind
    try:
        steps = int(coerce(args.get("max_steps") or -1, int))
    except ValueError as error:
        problem = Problem("max_steps", args["max_steps"], "it must be a whole number", "max_steps: 100")
        raise AdaptiveConfigError([problem]) from error
    estimate = None if steps > 0 else estimated_steps(args)
    shown = steps if steps > 0 else estimate or 100
    schedule = make_schedule(config.course, shown, budget[f"used_{kind}"], budget[f"asked_{kind}"])
    if isinstance(schedule, Schedule):
        print(schedule_table(start, schedule, shown))
    else:
        print(f"Ranks move about during training ({start.method}): {schedule.describe(kind)} of {shown}")
    if estimate:
        print(f"about {estimate:,} steps, estimated from num_train_epochs and the rows of the data set")
    elif steps <= 0:
        print("the number of steps follows from the data: the table stands for 100 of them")
    if (steps > 0 or estimate) and (warning := short_run_warning(schedule, shown)):
        print(f"warning: {warning}")
    print("live tensors:", *totals(start), sep="\n")
    print("ranks are found during training; nothing was written")
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Hand over to LLaMA-Factory's launcher with the hook in place here and in every torchrun worker."""
    _require_enabled()
    from llamafactory_adaptive.bridge.arguments import check_config_file

    check_config_file(arguments.config)
    sys.argv = ["llamafactory-cli", "train", str(arguments.config), *arguments.overrides]
    from llamafactory import launcher

    launcher.__file__ = str(Path(_bootstrap.__file__).resolve())  # the file torchrun is told to run
    launcher.launch()
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Tell what runs did, from the files in their ``output_dir``."""
    from llamafactory_adaptive.overview import comparison, data_of_unfinished_run, read_run, run_text

    unfinished = {folder: data_of_unfinished_run(folder) for folder in arguments.runs}
    runs = [read_run(folder) for folder in arguments.runs if unfinished[folder] is None]
    print("\n\n".join([*(text for text in unfinished.values() if text), *(run_text(run) for run in runs)]))
    if len(runs) > 1:
        print("\n" + comparison(runs))
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Lay a saved adapter out for a server and certify it; needs neither the hook nor LLaMA-Factory."""
    request = export_request(arguments)
    from llamafactory_adaptive.export.run import run_export

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


def doctor(arguments: argparse.Namespace) -> int:
    """Check the installation. Exit code 0 when adaptive runs will work through ``llamafactory-cli``."""
    probe = "import sys; print(any(type(f).__name__ == '_SeamFinder' for f in sys.meta_path))"
    try:
        answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=60)
        hooked = answer.stdout.strip() == "True"
    except subprocess.TimeoutExpired:
        print("a Python of this environment did not start within 60 s")
        hooked = False
    switch = os.environ.get(_bootstrap.ENV_SWITCH, "not set")
    print(f"start-up hook   {'active' if hooked else 'NOT active'}  ({_bootstrap.ENV_SWITCH}: {switch})")
    print(f"plugin          {__version__}  python {sys.version.split()[0]}")
    for name in PACKAGES:
        try:
            print(f"{name:<15} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:<15} not installed")
    states = _seam_states()
    for target, state in states.items():
        print(f"seam            {state:<15} {target}")
    if not hooked and _bootstrap.enabled():
        print("hint            use `llamafactory-adaptive train` here, or reinstall the plugin as a wheel")
    return 0 if hooked and all(state == "fits" for state in states.values()) else 2


def _seam_states() -> dict[str, str]:
    if not _bootstrap.enabled():
        return {}
    _bootstrap.install()
    from llamafactory_adaptive.bridge.seams import seam_states

    return seam_states()


def init(arguments: argparse.Namespace) -> int:
    """Copy the examples to ``FOLDER/examples``, the place from which their commands and paths hold."""
    target = arguments.folder / "examples"
    if target.exists():
        raise AdaptiveConfigError(
            [Problem("folder", str(target), "it exists already, nothing was overwritten", "another folder")]
        )
    shutil.copytree(examples_folder(), target, ignore=shutil.ignore_patterns("__pycache__", "*_train.jsonl"))
    print(f"examples copied to {target}; run the commands of its README.md from {arguments.folder.resolve()}")
    return 0


def examples_folder() -> Path:
    """Where the examples lie: beside the package in a checkout, else where the installer put the wheel's data."""
    checkout = Path(__file__).resolve().parents[1] / "examples"
    if checkout.is_dir():
        return checkout
    readme = "share/llamafactory-adaptive/examples/README.md"
    found = next(file for file in files("llamafactory-adaptive") or [] if str(file).endswith(readme))
    return Path(str(found.locate())).resolve().parent


def measure(arguments: argparse.Namespace) -> int:
    """Body of the measuring process; its answer file carries a user error back to the parent."""
    _require_enabled()
    from llamafactory_adaptive.bridge.child import end_with_parent
    from llamafactory_adaptive.bridge.measuring import run_measurement_job
    from llamafactory_adaptive.bridge.validation import parse_config

    end_with_parent(arguments.job.parent)
    job = json.loads(arguments.job.read_text(encoding="utf-8"))
    try:
        run_measurement_job(job, parse_config(job["args"]))
    except AdaptiveError as error:
        arguments.answer.write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
