"""What can go wrong in an export, and what other libraries say of it, in words."""

from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import AdaptiveError, refuse
from llamafactory_adaptive.export.folder_links import OutsideError, check_entries, inside
from llamafactory_adaptive.files import read_mapping


class ExportError(AdaptiveError, RuntimeError):
    """An adapter could not be exported; nothing carries the name of the output folder."""


def first_line(error: BaseException) -> str:
    """Say what an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def loading_fault(error: BaseException) -> str:
    """Say why transformers did not load something; its own advice to trust remote code is not passed on."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own, which is never run here"
    return first_line(error)


def read_untrusted(folder: Path, name: str, key: str) -> dict[str, Any]:
    """Read a JSON mapping of a folder that may come from anywhere; ``key`` is the option that named the folder.

    Raises:
        AdaptiveConfigError: it cannot be read, or leads out of the folder.
    """
    try:
        return read_mapping(inside(folder, name), name, error=ExportError)
    except (ExportError, OutsideError) as error:
        refuse(key, str(folder), str(error), "a complete copy", cause=error)


def refuse_entries_outside(folder: Path, key: str) -> None:
    """Refuse a folder with a link that leads out of it.

    Raises:
        AdaptiveConfigError: naming the link.
    """
    try:
        check_entries(folder)
    except (OutsideError, OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        suggestion = "a copy of the folder with the files themselves in it"
        refuse(key, str(folder), first_line(error), suggestion, cause=error)
