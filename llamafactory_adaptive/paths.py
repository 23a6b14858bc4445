"""Checks of paths that users write: what cannot be the path of a file is refused before anything opens it."""

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
