"""Paths as a user writes them: what no file can be called is refused before anything opens it."""

import argparse
import errno
import os
from pathlib import Path


def impossible_path(path: str) -> str:
    """Say why nothing can be called so; empty where something can, whether it is there or not."""
    try:
        os.lstat(os.path.expanduser(path))
    except ValueError:
        return "no name of a file has a zero byte in it"
    except OSError as error:
        return "it is longer than a path can be" if error.errno == errno.ENAMETOOLONG else ""
    return ""


def path_argument(text: str) -> Path:
    """Take a word of the command line for a path.

    Raises:
        argparse.ArgumentTypeError: nothing can be called so.
    """
    if why := impossible_path(text):
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {why}")
    return Path(text)
