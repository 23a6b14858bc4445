"""``llamafactory-adaptive init``: copy the example YAMLs."""

import argparse
import shutil
from importlib.metadata import files
from pathlib import Path

from llamafactory_adaptive.errors import AdaptiveConfigError, Problem


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
    checkout = Path(__file__).resolve().parents[2] / "examples"
    if checkout.is_dir():
        return checkout
    readme = "share/llamafactory-adaptive/examples/README.md"
    found = next(file for file in files("llamafactory-adaptive") or [] if str(file).endswith(readme))
    return Path(str(found.locate())).resolve().parent
