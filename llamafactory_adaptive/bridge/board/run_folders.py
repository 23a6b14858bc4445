"""Runs that have ended, as the board finds them in its folder of saved adapters."""

from contextlib import suppress
from pathlib import Path

from llamafactory.webui.common import DEFAULT_SAVE_DIR

from llamafactory_adaptive.files import PLAN_FILE, TRAINER_STATE


_MOST = 500  # entries of a list that a person chooses from


def finished_runs() -> list[str]:
    """List the folders of runs that have ended, as ``saves/<model>/<type>/<name>``, the newest first."""
    written: dict[Path, float] = {}
    for path in Path(DEFAULT_SAVE_DIR).glob(f"*/*/*/{PLAN_FILE}"):
        with suppress(OSError):  # it still trains, was broken off, or was removed meanwhile
            written[path.parent] = (path.parent / TRAINER_STATE).stat().st_mtime
    newest = sorted(written, key=written.__getitem__, reverse=True)
    return [str(folder) for folder in newest[:_MOST] if is_saved(folder)]


def is_saved(folder: Path) -> bool:
    """Tell whether a folder lies in the folder of saved adapters, wherever links lead."""
    return folder.resolve().is_relative_to(Path(DEFAULT_SAVE_DIR).resolve())


def is_unfinished(folder: Path) -> bool:
    """Tell whether a folder holds a run that still trains, or was broken off."""
    return (folder / PLAN_FILE).is_file() and not (folder / TRAINER_STATE).is_file()
