"""Paths: checks of those that users write, and the folders that come with the package."""

import argparse
import errno
import os
from pathlib import Path


def impossible_path(path: str) -> str:
    """Return the reason why no file can have this path; empty where one can, whether it exists or not."""
    try:
        os.lstat(os.path.expanduser(path))
    except ValueError:
        return "no name of a file has a zero byte in it"
    except OSError as error:
        return "it is longer than a path can be" if error.errno == errno.ENAMETOOLONG else ""
    return ""


def path_argument(text: str) -> Path:
    """Convert a word of the command line to a path.

    Raises:
        argparse.ArgumentTypeError: no file can have this path.
    """
    if why := impossible_path(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {why}")
    return Path(text)


def checkout() -> Path | None:
    """Return the checkout that the package runs from; None where it is installed from a wheel."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() else None


def shipped_file(name: str) -> Path:
    """Find a file that comes with the package: beside it in a checkout, else where the wheel's data was put.

    Raises:
        StopIteration: the installation lacks it.
    """
    if (folder := checkout()) is not None:
        return folder / name
    from importlib.metadata import PackageNotFoundError, files  # takes a while

    try:
        installed = files("llamafactory-adaptive") or []
    except PackageNotFoundError:  # on the path, but not installed
        installed = []
    file = next(file for file in installed if str(file).endswith(f"share/llamafactory-adaptive/{name}"))
    return Path(str(file.locate())).resolve()


def shipped_folder(name: str) -> Path:
    """Find a folder with a README.md that comes with the package.

    Raises:
        StopIteration: the installation lacks it.
    """
    return shipped_file(f"{name}/README.md").parent
