"""Scripts of benchmarks/, which import each other by their bare names."""

import importlib
import sys
from pathlib import Path


def import_benchmarks(*names):
    """The scripts of those names, by name; their folder is on the path only while they are imported."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(folder)
