"""Commands and arguments of the command line, each with help and an example."""

import argparse
import sys
from pathlib import Path

from llamafactory_adaptive import __version__
from llamafactory_adaptive.comparison.request import add_comparison_arguments
from llamafactory_adaptive.export.request import add_export_arguments
from llamafactory_adaptive.export.shrink.request import add_shrink_arguments
from llamafactory_adaptive.paths import path_argument


# Internal, so no help shows them: the processes that load a model for other commands, and that `compare` trains in.
MEASURE, COMPARISON_JOB = INTERNAL = ("measure", "comparison-job")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; CFG.yaml is a LLaMA-Factory training YAML, overrides are as upstream."""
    parser = argparse.ArgumentParser(
        prog="llamafactory-adaptive",
        description="Adaptive LoRA ranks with LLaMA-Factory: see them, train them, compare runs, serve adapters.",
        epilog="llamafactory-adaptive COMMAND --help says more, with examples.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, purpose: str, example: str) -> argparse.ArgumentParser:
        words = f"example: llamafactory-adaptive {name} {example}".rstrip()
        return commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", epilog=words)

    plan = command("plan", "show and write the ranks that a run would train, without training", "my.yaml lora_rank=16")
    _add_config(plan)
    plan.add_argument(
        "--out", type=path_argument, metavar="DIR",
        help="folder to which the plan and its heat-map are written, e.g. planned (default: output_dir)",
    )  # fmt: skip
    plan.add_argument(
        "--peft", type=path_argument, metavar="DIR",
        help="folder for an adapter_config.json that gives these ranks to any trainer on PEFT, e.g. planned/peft",
    )  # fmt: skip
    _add_json(plan)
    _add_config(
        command(
            "train", "train as llamafactory-cli train does, also where the start-up hook is missing", "my.yaml seed=1"
        )
    )
    report = command(
        "report",
        "show ranks, losses and training data of finished runs, and compare them where there are several",
        "saves/igu saves/lora",
    )
    report.add_argument(
        "runs",
        type=path_argument,
        nargs="+",
        metavar="OUTPUT_DIR",
        help="output_dir of one run or of several, e.g. saves/igu",
    )
    report.add_argument(
        "--html", type=path_argument, metavar="FILE",
        help="file that does not exist yet, to which all of it is written as one page with pictures, e.g. report.html",
    )  # fmt: skip
    _add_json(report)
    add_comparison_arguments(
        command(
            "compare",
            "compare ways to fine-tune on your own data: equal budgets, each at its own best learning rate",
            "my.yaml --arms igu,sensitivity --seeds 5 --out compared",
        )
    )
    add_export_arguments(
        command(
            "export",
            "write an adapter in the layout of a server, and certify that it answers as PEFT does",
            "saves/igu --for vllm --out served/igu",
        )
    )
    add_shrink_arguments(
        command(
            "shrink",
            "cut a trained LoRA adapter to a budget, or show what each of several budgets would keep of it",
            "saves/lora --rank 8 --out saves/lora-8",
        )
    )
    doctor = command(
        "doctor",
        "check the installation: the start-up hook, package versions, and whether this LLaMA-Factory fits the plugin",
        "",
    )
    _add_json(doctor)
    init = command("init", "copy the example YAMLs to a folder", "work")
    init.add_argument(
        "folder", type=path_argument, nargs="?", default=Path(), metavar="DIR",
        help="folder in which the folder examples is made, e.g. work (default: the current folder)",
    )  # fmt: skip
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=path_argument, metavar="CFG.yaml",
        help="a LLaMA-Factory training YAML, e.g. examples/train_adaptive/qwen3_adaptive_sft.yaml",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file, e.g. lora_rank=16"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true",
        help="print one JSON document instead, whose keys docs/reports.md describes, e.g. for scripts",
    )  # fmt: skip


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    """Parse a command line, with overrides allowed on either side of options."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) == 2 and words[0] in INTERNAL:
        return argparse.Namespace(command=words[0], answer=Path(words[1]))
    parser = build_parser()
    arguments, rest = parser.parse_known_args(words)
    arguments.words = words
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognised: {' '.join(stray or rest)}; overrides are written key=value")
    if rest:
        arguments.overrides += rest
    if bare := [word for word in getattr(arguments, "overrides", []) if "=" not in word]:
        parser.error(f"{' '.join(bare)}: overrides are written key=value, e.g. lora_rank=16")
    return arguments
