"""Options as dataclass fields: help, unit and range in one place, and typed values from YAML or a command line."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, field
from typing import Any

from llamafactory_adaptive.errors import Problem


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    odd: bool = False,
    before: Any = MISSING,
) -> Any:
    """Declare one option as a dataclass field: default, help, unit, and closed range ``[low, high]`` or allowed words.

    Unit, range and allowed words are part of the generated help. ``before`` is the value that runs had before the
    option existed, where that is not the default.
    """
    rules = {"low": low, "high": high, "choices": choices, "odd": odd, "before": before}
    allowed = describe_allowed(rules)
    text = help + (f" Unit: {unit}." if unit else "") + (f" Allowed: {allowed}." if allowed else "")
    return field(default=default, metadata={"help": text, **rules})


def describe_allowed(rules: Mapping[str, Any]) -> str:
    """Describe the values that a field allows in words; empty where every value is allowed."""
    if rules.get("choices"):
        return "one of " + ", ".join(rules["choices"])
    low, high = rules.get("low"), rules.get("high")
    if low is not None and high is not None:
        text = f"between {format_bound(low)} and {format_bound(high)}"
    elif low is not None:
        text = f"at least {format_bound(low)}"
    else:
        text = f"at most {format_bound(high)}" if high is not None else ""
    return f"an odd number {text}".rstrip() if rules.get("odd") else text


def format_bound(bound: float) -> str:
    """Format a bound for a message: large whole numbers with commas, as 1,000,000, others in short."""
    return f"{int(bound):,}" if float(bound).is_integer() else f"{bound:g}"


def coerce(value: Any, annotation: Any) -> Any:
    """Convert a YAML or command-line value to the annotated type.

    Raises:
        ValueError, TypeError, OverflowError: the value has another meaning.
    """
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        inner = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
        return None if value is None or value in ("null", "None") else coerce(value, inner[0])
    if annotation is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        raise ValueError(value)
    if isinstance(value, bool) or value is None:
        raise ValueError(value)
    if annotation is int:
        if float(value) != int(float(value)):
            raise ValueError(value)
        return int(float(value))
    if annotation is float:
        if not math.isfinite(number := float(value)):
            raise ValueError(value)
        return number
    if isinstance(value, (dict, list)):
        raise ValueError(value)
    return str(value)


def parse_share(text: str) -> float:
    """Convert ``0.95`` or ``95%`` to a number.

    Raises:
        ValueError: it is neither.
    """
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_fields(owner: type, prefix: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Check the flat keys of one dataclass of options, and convert their values.

    Args:
        owner: a dataclass whose fields were made by :func:`option`.
        prefix: what stands before a field's name in the YAML (``"sensitivity_"``).
        values: the flat YAML mapping; other keys are ignored.

    Returns:
        The typed values by field name, with defaults filled in, and the problems found.
    """
    hints = typing.get_type_hints(owner)
    result: dict[str, Any] = {}
    problems: list[Problem] = []
    for entry in dataclasses.fields(owner):
        key, default = prefix + entry.name, entry.default
        result[entry.name] = default
        if key not in values or values[key] is None:
            continue
        value = values[key]
        if value is False and "off" in (entry.metadata.get("choices") or ()):
            value = "off"  # what YAML makes of the word
        try:
            result[entry.name] = coerce(value, hints[entry.name])
            fault = _range_fault(result[entry.name], entry.metadata)
        except (ValueError, TypeError, OverflowError):
            fault = _type_fault(_plain_type(hints[entry.name]), entry.metadata)
        if fault:
            result[entry.name] = default
            problems.append(Problem(key, values[key], fault, _suggest(key, values[key], entry)))
    return completed(owner, result), problems


def completed(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in options whose default depends on other options, which ``complete()`` of their dataclass knows."""
    complete = getattr(owner, "complete", dict)
    return dict(complete(values))


def with_earlier_values(owner: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Add to options that an earlier version stored the values that it had in place of options it did not know."""
    earlier = {
        entry.name: entry.default if entry.metadata["before"] is MISSING else entry.metadata["before"]
        for entry in dataclasses.fields(owner)
    }
    return {**earlier, **stored}


def contradictions(options: Any) -> list[Problem]:
    """List what options say against each other, which their own ``check()`` knows; not every method's have one."""
    problems: list[Problem] = getattr(options, "check", list)()
    return problems


def _plain_type(annotation: Any) -> Any:
    arms = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
    return arms[0] if arms else annotation


def _type_fault(kind: type, rules: Mapping[str, Any]) -> str:
    """Describe what a value of another type should be, in words."""
    allowed = describe_allowed(rules)
    words = [] if rules.get("odd") else [_TYPE_WORDS[kind]]  # an odd number is a whole one
    return "must be " + ", ".join([*words, allowed] if allowed else words)


def _range_fault(value: Any, rules: Mapping[str, Any]) -> str:
    """Return the rule that ``value`` breaks, in words; empty where it breaks none."""
    choices, low, high = rules.get("choices"), rules.get("low"), rules.get("high")
    bad = (
        (choices and value not in choices)
        or (low is not None and value is not None and value < low)
        or (high is not None and value is not None and value > high)
        or (rules.get("odd") and value % 2 == 0)
    )
    return f"must be {describe_allowed(rules)}" if bad else ""


def _suggest(key: str, value: Any, entry: "dataclasses.Field[Any]") -> str:
    choices = entry.metadata.get("choices")
    if choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        return f"{key}: {near[0] if near else choices[0]}"
    return f"leaving {key} out" if entry.default is None else f"{key}: {entry.default}"
