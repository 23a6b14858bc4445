"""Errors of an export, and the words for errors of other libraries."""

from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import AdaptiveError, refuse
from llamafactory_adaptive.export.folder_links import OutsideError, check_entries, inside
from llamafactory_adaptive.files import read_mapping


class ExportError(AdaptiveError, RuntimeError):
    """Error of an adapter that could not be exported; nothing was written to the output folder."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def loading_fault(error: BaseException) -> str:
    """Describe why transformers did not load something, without its advice to trust remote code."""
    if "trust_remote_code" in str(error):
        return "it comes with Python code of its own, which is never run here"
    return first_line(error)


def read_untrusted(folder: Path, name: str, key: str) -> dict[str, Any]:
    """Read a JSON mapping from an untrusted folder; ``key`` is the option that named the folder.

    Raises:
        AdaptiveConfigError: the file cannot be read, or leads out of the folder.
    """
    try:
        return read_mapping(inside(folder, name), name, error=ExportError)
    except (ExportError, OutsideError) as error:
        refuse(key, str(folder), str(error), "a complete copy", cause=error)


def refuse_entries_outside(folder: Path, key: str) -> None:
    """Refuse a folder with an entry that leads out of it or is not an ordinary file.

    Raises:
        AdaptiveConfigError: there is such an entry; the message names it.
    """
    try:
        check_entries(folder)
    except (OutsideError, OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        suggestion = "a copy of the folder with the files themselves in it"
        refuse(key, str(folder), first_line(error), suggestion, cause=error)
