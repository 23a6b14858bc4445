"""Folders that may come from anywhere: which of their entries may be opened or copied.

A link in a downloaded folder can point at any file of this machine, and what is read through it would end up in an
export that is then shared. The cache of the Hugging Face hub consists of links, though:
``snapshots/<revision>/<file>`` points at ``blobs/<digest>`` of the same model. Those, and links that stay inside the
folder, are followed.
"""

import argparse
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class OutsideError(ValueError):
    """An entry of a folder that leads out of it, or is no ordinary file."""


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


def inside(folder: Path, name: str) -> Path:
    """Give the path of entry ``name`` of ``folder``, which need not exist.

    Raises:
        OutsideError: the name is absolute or has ``..`` in it, or a link leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise OutsideError(f"{name!r} is no name inside the folder")
    path = folder / name
    home = folder.resolve()
    target = path.resolve()
    if target.is_relative_to(home) or _is_blob(home, target):
        return path
    raise OutsideError(f"{name} is a link that leads out of the folder")


def _is_blob(home: Path, target: Path) -> bool:
    """Tell whether ``target`` is a blob of the hub-cache entry that ``home`` is a snapshot of."""
    if not _DIGEST.fullmatch(target.name):
        return False
    snapshots = (place for place in home.parents if place.name == "snapshots")
    entries = (place.parent for place in snapshots if place.parent.name.startswith("models--"))
    return any(target.parent == entry / "blobs" for entry in entries)


def entries_inside(folder: Path, *patterns: str) -> Iterator[Path]:
    """Give the ordinary files of ``folder`` that match, by :func:`inside`; folders of such a name are passed over.

    Raises:
        OutsideError: one leads out of the folder.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        found = inside(folder, path.relative_to(folder).as_posix())
        if found.is_file():
            yield found


def check_entries(folder: Path) -> None:
    """Refuse a folder with an entry that no library should be allowed to open.

    Libraries that load a model or tokenizer choose for themselves what they read, so every entry is looked at, and
    what is one level below in folders of templates.

    Raises:
        OutsideError: naming a link that leads out, or a pipe, socket or device, which could block for ever.
    """
    for path in sorted({*folder.glob("*"), *folder.glob("additional_chat_templates/*")}):
        name = path.relative_to(folder).as_posix()
        found = inside(folder, name)
        if found.exists() and not (found.is_file() or found.is_dir()):
            raise OutsideError(f"{name} is no ordinary file")
