"""The scratch folder that an export is written into before it is renamed; those of killed exports are removed."""

import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from llamafactory_adaptive.errors import OutputError, refuse
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.files import LOCK_FILE, cannot_write, could_not_write
from llamafactory_adaptive.folder_lock import locked


# An export holds no lock for a moment between making and locking its folder, and between unlocking and renaming it.
_MOMENT_S = 3600.0


def check_new_folder(out: Path) -> None:
    """Refuse an output folder that has something in it, or is a link.

    Raises:
        AdaptiveConfigError: there is something at ``out``.
    """
    if out.is_symlink():
        refuse("out", str(out), "it is a link, nothing was overwritten", "the folder it points at")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        refuse("out", str(out), "it exists already, nothing was overwritten", "another folder")


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """Provide a folder beside ``out`` for the time of the context; it is renamed to ``out`` on success, else removed.

    It is locked as long as this process lives, so that other exports can tell it from a folder that was left behind.

    Raises:
        ExportError: nothing can be written there, or ``out`` was created in the meantime.
    """
    remove_left_behind(out)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ExportError(f"nothing can be written to {out.parent}: {error.strerror}") from error
    try:
        with locked(folder, 0):
            yield folder
            (folder / LOCK_FILE).unlink()
            _take_name(folder, out)
    except (OSError, SafetensorError) as error:
        if not could_not_write(error):
            raise
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_name(folder: Path, out: Path) -> None:
    try:
        folder.replace(out)
    except OSError as error:
        raise ExportError(
            f"{out} has come into being meanwhile ({error.strerror}); it is left as it is, export again elsewhere"
        ) from error


def remove_left_behind(out: Path) -> None:
    """Remove scratch folders of exports to ``out`` whose process has ended; those in use, on any machine, stay."""
    for folder in _scratch_folders(out):
        try:
            if not (folder / LOCK_FILE).exists() and time.time() - folder.stat().st_mtime < _MOMENT_S:
                continue
            with locked(folder, 0):
                shutil.rmtree(folder, ignore_errors=True)
        except (OSError, OutputError):  # in use, or of another user
            continue


def _scratch_folders(out: Path) -> list[Path]:
    start, end = f".{out.name}.", ".tmp"
    try:
        return [
            path
            for path in out.parent.iterdir()
            if path.name.startswith(start)
            and path.name.endswith(end)
            and len(path.name) == len(start) + 32 + len(end)
            and path.is_dir()
            and not path.is_symlink()
        ]
    except OSError:  # no such folder yet, say
        return []
