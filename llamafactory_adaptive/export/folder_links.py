"""Checks of untrusted folders: which of their entries may be opened or copied.

A link in a downloaded folder can point at any file of this machine, and what is read through it would end up in an
export that is then shared. The cache of the Hugging Face hub, however, consists of links:
``snapshots/<revision>/<file>`` points at ``blobs/<digest>`` of the same model. Those, and links that stay inside the
folder, are followed.
"""

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO


_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class OutsideError(ValueError):
    """Error about an entry of a folder that leads out of it, or is not an ordinary file."""


def inside(folder: Path, name: str) -> Path:
    """Return the path of entry ``name`` of ``folder``, which need not exist.

    Raises:
        OutsideError: the name is absolute or has ``..`` in it, or a link leads out of the folder.
    """
    _target(folder, name)
    return folder / name


def _target(folder: Path, name: str) -> tuple[Path, Path]:
    """Resolve the links of an entry into the folder that it may lie in, without links, and its path in there."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise OutsideError(f"{name!r} is no name inside the folder")
    home = folder.resolve()
    target = (folder / name).resolve()
    if target.is_relative_to(home):
        return home, target.relative_to(home)
    if _is_blob(home, target):
        return target.parent, Path(target.name)
    raise OutsideError(f"{name} is a link that leads out of the folder")


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open entry ``name`` of ``folder`` for reading: the file that was checked, even if its name is reused meanwhile.

    Raises:
        OutsideError: as :func:`inside`; or part of its path became a link after the check; or it is not an ordinary
            file.
        OSError: it does not exist, or may not be read.
    """
    home, rest = _target(folder, name)
    steps = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(home, steps)
    try:
        for part in rest.parts[:-1]:
            above, handle = handle, os.open(part, steps, dir_fd=handle)
            os.close(above)
        # Without waiting: a pipe has nobody at its other end.
        file = os.open(rest.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise OutsideError(f"{name} has become a link while it was read") from error
        raise
    finally:
        os.close(handle)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OutsideError(f"{name} is no ordinary file")
    return os.fdopen(file, "rb")


def _is_blob(home: Path, target: Path) -> bool:
    """Tell whether ``target`` is a blob of the hub-cache entry that ``home`` is a snapshot of."""
    if not _DIGEST.fullmatch(target.name):
        return False
    snapshots = (folder for folder in home.parents if folder.name == "snapshots")
    entries = (folder.parent for folder in snapshots if folder.parent.name.startswith("models--"))
    return any(target.parent == entry / "blobs" for entry in entries)


def entries_inside(folder: Path, *patterns: str) -> Iterator[Path]:
    """Yield the ordinary files of ``folder`` that match a pattern, checked by :func:`inside`; folders are skipped.

    Raises:
        OutsideError: an entry leads out of the folder.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        entry = inside(folder, path.relative_to(folder).as_posix())
        if entry.is_file():
            yield entry


def check_entries(folder: Path) -> None:
    """Refuse a folder with an entry that no library should be allowed to open.

    Libraries that load a model or tokenizer choose themselves which files they read, so every entry is checked, and
    those of the folder of chat templates.

    Raises:
        OutsideError: an entry is a link that leads out, or a pipe, socket or device, which could block for ever; the
            message names it.
    """
    for path in sorted({*folder.glob("*"), *folder.glob("additional_chat_templates/*")}):
        name = path.relative_to(folder).as_posix()
        entry = inside(folder, name)
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise OutsideError(f"{name} is no ordinary file")
