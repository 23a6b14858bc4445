"""Typed reading of a plan document; every value is checked, since a plan file may come from anywhere."""

import re
from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.ranks.module_names import is_module_name


LARGEST = 2**31  # of any size, rank or count
MOST_MODULES = 1_000_000
UNITS = ("params", "ranks")
_LARGEST_FLOAT = 1e300  # sums of many stay finite
_METHOD = re.compile(r"[\w.\-]{1,100}", re.ASCII)


class Values:
    """One mapping of a plan document, whose values are read and checked by type.

    Args:
        document: the mapping.
        where: name of the mapping in error messages.
    """

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, Mapping):
            raise PlanError(f"{where} is no mapping but a {type(document).__name__}")
        self.document, self.where = document, where

    def integer(self, key: str, least: int) -> int:
        """Read a whole number of at least ``least``."""
        value = self._value(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            raise self._error(key, value, f"a whole number of at least {least} and at most {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a finite number; the key may be missing only if there is a ``default``."""
        value = self._value(key) if default is None else self.document.get(key, default)
        return self._finite(key, value)

    def positive(self, key: str) -> float:
        """Read a finite number above zero."""
        value = self.number(key)
        if value <= 0:
            raise self._error(key, value, "a positive number")
        return value

    def numbers(self, key: str) -> dict[str, float]:
        """Read a mapping of names to finite numbers; a missing one reads as empty."""
        return {name: self._finite(f"{key} {name}", value) for name, value in self.mapping(key).items()}

    def method(self, key: str) -> str:
        """Read the name of a method: letters, digits, ``_``, ``.`` and ``-``."""
        value = self._value(key)
        if not isinstance(value, str) or not _METHOD.fullmatch(value):
            raise self._error(key, value, "a name of letters, digits, _ . and -")
        return value

    def unit(self, key: str) -> str:
        """Read the unit of the budget."""
        value = self._value(key)
        if value not in UNITS:
            raise self._error(key, value, f"one of {', '.join(UNITS)}")
        return str(value)

    def module_name(self, key: str) -> str:
        """Read the full name of a module."""
        value = self._value(key)
        if not is_module_name(value):
            raise self._error(key, value, "the name of a module, words with dots between them")
        return str(value)

    def mapping(self, key: str) -> dict[str, Any]:
        """Read a mapping whose keys are strings; a missing one reads as empty."""
        value = self.document.get(key, {})
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise self._error(key, value, "a mapping")
        return dict(value)

    def sequence(self, key: str) -> list[Any]:
        """Read a list of at most ``MOST_MODULES`` entries."""
        value = self._value(key)
        if not isinstance(value, list) or len(value) > MOST_MODULES:
            raise self._error(key, value, f"a list of at most {MOST_MODULES:,} entries")
        return value

    def part(self, key: str) -> "Values":
        """Return the mapping under ``key`` as :class:`Values` of its own."""
        return Values(self._value(key), f"{self.where}: {key}")

    def _value(self, key: str) -> Any:
        if key not in self.document:
            raise PlanError(f"{self.where} is not a complete plan: {key} is missing")
        return self.document[key]

    def _finite(self, key: str, value: Any) -> float:
        # Whole numbers of JSON have no largest one; beyond a float's range they would not convert.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST_FLOAT:
            raise self._error(key, value, "a finite number")
        return float(value)

    def _error(self, key: str, value: Any, allowed: str) -> PlanError:
        return PlanError(f"{self.where} has {key} {shortened(value)}; it must be {allowed}")


def shortened(value: Any) -> str:
    """Format a value for an error message, cut at 80 characters."""
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}..."
