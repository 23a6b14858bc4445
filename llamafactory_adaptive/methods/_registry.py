"""Registry of methods by name: imported when used, with suggestions for misspelt names, open to other packages.

Another package adds a method with an entry point in the group ``llamafactory_adaptive.methods``::

    [project.entry-points."llamafactory_adaptive.methods"]
    my_method = "my_package.my_method:MyMethod"
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.methods._traits import trait_faults


ENTRY_POINT_GROUP = "llamafactory_adaptive.methods"


class UnknownMethodError(AdaptiveError, KeyError):
    """No method of that name is registered."""

    def __str__(self) -> str:
        return str(self.args[0])


class InvalidMethodError(AdaptiveError, TypeError):
    """A registered class is no method: it lacks its traits, or members that they demand."""


def built_in() -> dict[str, str]:
    """Map each built-in name to its target: ``my_method.py`` holds the class ``MyMethod``. Nothing is imported."""
    files = sorted((Path(__file__).parent).glob("[!_]*.py"))
    return {
        file.stem: f"llamafactory_adaptive.methods.{file.stem}:{file.stem.title().replace('_', '')}" for file in files
    }


@cache
def methods() -> dict[str, str]:
    """Map all registered names to their ``module:Class`` targets; nothing is imported.

    Raises:
        AdaptiveError: two packages register one name.
    """
    targets = built_in()
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in targets:
            raise AdaptiveError(
                f"the method name {entry.name!r} is registered twice: {targets[entry.name]}, {entry.value}"
            )
        targets[entry.name] = entry.value
    return targets


def get_method(name: str) -> Any:
    """Import the class registered under ``name``, and check that it has the members of a method.

    Raises:
        UnknownMethodError: no such name; the message suggests the nearest one.
        InvalidMethodError: the class lacks members, which the message names.
    """
    if name not in methods():
        known = ", ".join(sorted(methods()))
        raise UnknownMethodError(f"unknown method {name!r}: registered are {known}; try {nearest(name)}")
    module, _, attribute = methods()[name].partition(":")
    method = getattr(import_module(module), attribute)
    if not hasattr(method, "Options"):
        _refuse(name, ["it lacks Options, the dataclass of its options"])
    _refuse(name, trait_faults(method(method.Options())))
    return method


def make_method(name: str, options: Mapping[str, Any]) -> Any:
    """Make the method registered under ``name`` with its options.

    Raises:
        UnknownMethodError, InvalidMethodError: as :func:`get_method`; members are checked with these options, too.
    """
    method = get_method(name)
    made = method(method.Options(**options))
    _refuse(name, trait_faults(made))
    return made


def is_dynamic(method: type[Any]) -> bool:
    """Tell whether a method class, at its default options, finds ranks during training."""
    return bool(method(method.Options()).traits.dynamic)


def _refuse(name: str, faults: list[str]) -> None:
    if faults:
        raise InvalidMethodError(
            f"the method {name!r} ({methods()[name]}) cannot be used: {'; '.join(faults)} (docs/adding-a-method.md)"
        )


def nearest(name: str) -> str:
    """Find the registered name that is most similar to ``name``."""
    return next(iter(difflib.get_close_matches(name, methods(), n=1, cutoff=0.0)))
