"""The options that the panel offers, generated from the options themselves: a new method needs no code here."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.init_checks import check_init
from llamafactory_adaptive.config.key_checks import check_kind
from llamafactory_adaptive.errors import Problem, refuse_all
from llamafactory_adaptive.methods import get_method, is_dynamic, make_method, methods
from llamafactory_adaptive.options import check_fields


METHOD_KEY, PLAN_KEY = "adaptive_method", "adaptive_plan"


@dataclass(frozen=True)
class OptionField:
    """One option as a field of the panel.

    Attributes:
        key: its key in a YAML.
        method: the method whose option it is; empty for one that holds for every method.
        kind: the type of its values: bool, int, float or str.
        default: its default; None where that follows from other options.
        help: its help, in English.
        choices: the values that are allowed, where they are words.
    """

    key: str
    method: str
    kind: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Return the words that can be chosen, where the field is a choice."""
        return self.choices or (("true", "false") if self.kind is bool and self.default is None else ())

    @property
    def blank(self) -> Any:
        """Return what the field shows of an option that is at its default: nothing, if that follows from others."""
        return "" if self.default is None else self.default

    def admitted(self, value: Any) -> Any:
        """Return a value that the field can show: the one given, or the default where a file holds another kind."""
        if self.words:
            return value if isinstance(value, str) and value in self.words else self.blank
        kinds: dict[type, Any] = {bool: bool, str: str, int: (int, float), float: (int, float)}
        fits = isinstance(value, str if self.default is None else kinds[self.kind])
        return value if fits and isinstance(value, bool) is (self.kind is bool) else self.blank


@cache
def option_fields() -> tuple[OptionField, ...]:
    """List all options: those that hold for every method, then those of each method."""
    common = _fields_of(AdaptiveArguments, "")
    return (*common, *(field for name in sorted(methods()) for field in _fields_of(get_method(name).Options, name)))


def _fields_of(owner: type[Any], method: str) -> list[OptionField]:
    hints = typing.get_type_hints(owner)
    return [_field(entry, hints[entry.name], method) for entry in dataclasses.fields(owner)]


def _field(entry: "dataclasses.Field[Any]", annotation: Any, method: str) -> OptionField:
    key = f"{method}_{entry.name}" if method else entry.name
    arms = [arm for arm in typing.get_args(annotation) if arm is not type(None)] or [annotation]
    choices = tuple(sorted(methods())) if key == METHOD_KEY else entry.metadata.get("choices") or ()
    return OptionField(key, method, arms[0], entry.default, entry.metadata["help"], choices)


@cache
def keys_of(method: str) -> frozenset[str]:
    """Return the keys that a method at its defaults reads: its own, and those of every method that have an effect."""
    cls, traits = get_method(method), make_method(method, {}).traits
    common = {entry.name: True for entry in dataclasses.fields(AdaptiveArguments)}
    idle = check_kind(common, method, is_dynamic(cls), traits.strategy, traits.spectral)
    started = {"adaptive_init": "gora", "adaptive_init_gamma": None}
    idle += check_init({}, started, method, is_dynamic(cls))
    unread = {problem.key for problem in idle}
    unread |= set(started) if "adaptive_init" in unread else set()
    own = {field.key for field in option_fields() if field.method == method}
    return frozenset((set(common) - unread) | own)


def changed_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert what the fields hold to the settings of a run: those that the method reads and that are not default.

    Args:
        values: what each field holds, by key.

    Raises:
        AdaptiveConfigError: values are not allowed; the message gives every problem.
    """
    method = values.get(METHOD_KEY) or AdaptiveArguments.adaptive_method
    if method not in methods():
        refuse_all(Problem(METHOD_KEY, method, "there is no such method", f"{METHOD_KEY}: sensitivity"))
    read = keys_of(method)
    given = {
        field.key: values[field.key]
        for field in option_fields()
        if field.key in read and field.key in values and values[field.key] not in (None, "", field.default)
    }
    common, problems = check_fields(AdaptiveArguments, "", given)
    own, faults = check_fields(get_method(method).Options, f"{method}_", given)
    refuse_all(*problems, *faults)
    typed = {**common, **{f"{method}_{name}": value for name, value in own.items()}}
    return {key: typed[key] for key in given}
