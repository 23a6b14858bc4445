"""Values out of files of any origin: taken if they are what they should be, else left out."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def is_number(value: object) -> bool:
    """Tell whether a value is a number that converts to float; whole numbers in JSON may be too large for that."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**1000


def number(value: Any) -> float | None:
    """Return ``value`` as float if it is a finite number; None otherwise."""
    return float(value) if is_number(value) and math.isfinite(value) else None


def text(value: Any) -> str:
    """Return ``value`` if it is a text; an empty one otherwise."""
    return value if isinstance(value, str) else ""


def texts(value: Any) -> list[str]:
    """List the texts in ``value``, if it is a list; other entries are left out."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def mappings(value: Any) -> list[Mapping[str, Any]]:
    """List the mappings in ``value``, if it is a list; other entries are left out."""
    entries: Iterable[Any] = value if isinstance(value, list) else ()
    return [entry for entry in entries if isinstance(entry, Mapping)]
