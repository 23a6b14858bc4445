"""Settings are checked and ranks computed without torch: import-linter passes over what a parent package imports."""

import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT


PACKAGE = ROOT / "llamafactory_adaptive"
HEAVY = ("torch", "transformers", "peft", "llamafactory")


@pytest.mark.parametrize("room", ["config", "ranks"])
def test_a_room_is_imported_without_heavy_packages(room):
    names = sorted(f"llamafactory_adaptive.{room}.{path.stem}" for path in (PACKAGE / room).glob("[!_]*.py"))
    assert len(names) > 3
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); "
        f"from importlib import import_module; print([import_module(name).__name__ for name in {names!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{names!r}\n"), done.stderr


def test_the_command_line_is_parsed_without_heavy_packages():
    """Every command would otherwise start seconds later, ``--help`` too."""
    heavy = (*HEAVY, "numpy", "matplotlib")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy!r})); from llamafactory_adaptive.cli import app; "
        "from llamafactory_adaptive.cli.parser import parse_command_line; "
        "print(parse_command_line(['compare', 'my.yaml', '--out', 'x']).command)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "compare\n"), done.stderr
