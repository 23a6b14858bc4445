"""Runs that have ended, as the board finds them in its folder of saved adapters."""

from contextlib import suppress
from pathlib import Path

from llamafactory.webui.common import DEFAULT_SAVE_DIR

from llamafactory_adaptive.files import PLAN_FILE


_MOST = 500  # entries of a list that a person chooses from


def finished_runs() -> list[str]:
    """List the folders of runs with a plan, as ``saves/<model>/<type>/<name>``, the newest first."""
    written: dict[Path, float] = {}
    for path in Path(DEFAULT_SAVE_DIR).glob(f"*/*/*/{PLAN_FILE}"):
        with suppress(OSError):  # removed meanwhile
            written[path.parent] = path.stat().st_mtime
    newest = sorted(written, key=written.__getitem__, reverse=True)
    return [str(folder) for folder in newest[:_MOST] if is_saved(folder)]


def is_saved(folder: Path) -> bool:
    """Tell whether a folder lies in the folder of saved adapters, wherever links lead."""
    return folder.resolve().is_relative_to(Path(DEFAULT_SAVE_DIR).resolve())
