"""Values of options: what a YAML or a command line writes becomes the type, or is refused with a value to try."""

from dataclasses import dataclass

import pytest

from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.options import check_fields, coerce, contradictions, describe_allowed, option


@dataclass(frozen=True)
class Options:
    metric: str = option("both", "Which part.", choices=("local", "global", "both"))
    probes: str = option("on", "Extra passes.", choices=("on", "off"))
    steps: int = option(7, "Steps.", unit="optimizer steps", low=1, high=99, odd=True)
    ratio: float = option(0.5, "Share.", low=0.0, high=1.0)
    limit: float | None = option(None, "Limit.", low=0.0)
    largest: int = option(3, "Largest.", high=8)
    flag: bool = option(False, "Flag.")


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        ("3", int, 3),
        ("3.0", int, 3),
        (3.0, int, 3),
        ("1e-3", float, 0.001),  # what YAML 1.1 leaves as a text
        (2, float, 2.0),
        (True, bool, True),
        ("False", bool, False),
        ("true", bool, True),
        ("word", str, "word"),
        (12, str, "12"),
        (None, float | None, None),
        ("null", int | None, None),
        ("None", str | None, None),
        ("5", int | None, 5),
    ],
)
def test_values_become_the_type(value, annotation, expected):
    converted = coerce(value, annotation)
    assert (converted, type(converted)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3.5, int),
        ("3.5", int),
        ("three", int),
        (True, int),
        (None, int),
        ([3], int),
        (float("inf"), int),
        (float("nan"), int),
        ("nan", float),
        ("inf", float),
        (False, float),
        ({"a": 1}, float),
        (1, bool),
        ("yes", bool),
        (None, bool),
        (True, str),
        (None, str),
        (["a"], str),
        ({}, str),
        ("high", int | None),
        (False, float | None),
    ],
    ids=str,
)
def test_values_of_another_meaning_are_not_converted(value, annotation):
    with pytest.raises((ValueError, TypeError, OverflowError)):
        coerce(value, annotation)


def check(**values):
    typed, problems = check_fields(Options, "own_", {f"own_{key}": value for key, value in values.items()})
    return typed, [(problem.key, problem.allowed, problem.suggestion) for problem in problems]


DEFAULTS = {
    "metric": "both",
    "probes": "on",
    "steps": 7,
    "ratio": 0.5,
    "limit": None,
    "largest": 3,
    "flag": False,
}


def test_defaults_fill_in_and_other_keys_are_ignored():
    assert check_fields(Options, "own_", {"other_steps": "x", "steps": 4, "own_steps": None}) == (DEFAULTS, [])


def test_good_values_are_typed_and_the_ends_of_a_range_belong_to_it():
    typed, problems = check(metric="local", steps="99", ratio=1, limit="0", largest=8, flag="True")
    assert problems == []
    assert typed == {
        **DEFAULTS,
        "metric": "local",
        "steps": 99,
        "ratio": 1.0,
        "limit": 0.0,
        "largest": 8,
        "flag": True,
    }
    assert check(steps=1, ratio="0.0") == ({**DEFAULTS, "steps": 1, "ratio": 0.0}, [])


@pytest.mark.parametrize(
    ("key", "value", "allowed", "suggestion"),
    [
        ("steps", 0, "must be an odd number between 1 and 99", "own_steps: 7"),
        ("steps", 101, "must be an odd number between 1 and 99", "own_steps: 7"),
        ("steps", 4, "must be an odd number between 1 and 99", "own_steps: 7"),
        ("steps", "many", "must be an odd number between 1 and 99", "own_steps: 7"),
        ("ratio", 1.01, "must be between 0 and 1", "own_ratio: 0.5"),
        ("ratio", "half", "must be a number, between 0 and 1", "own_ratio: 0.5"),
        ("limit", -1, "must be at least 0", "leaving own_limit out"),
        ("limit", "low", "must be a number, at least 0", "leaving own_limit out"),
        ("largest", 9, "must be at most 8", "own_largest: 3"),
        ("flag", 1, "must be true or false", "own_flag: False"),
        ("metric", "locl", "must be one of local, global, both", "own_metric: local"),
        ("metric", "globall", "must be one of local, global, both", "own_metric: global"),
        ("metric", "xyz", "must be one of local, global, both", "own_metric: local"),
        ("metric", ["local"], "must be a text, one of local, global, both", "own_metric: local"),
    ],
)
def test_wrong_values_are_told_with_what_is_allowed_and_a_value_to_try(key, value, allowed, suggestion):
    typed, problems = check(**{key: value})
    assert problems == [(f"own_{key}", allowed, suggestion)]
    assert typed == DEFAULTS, "a wrong value leaves the default"


def test_all_problems_come_at_once_with_the_values_as_written():
    _, problems = check_fields(Options, "", {"steps": "4", "ratio": 2})
    assert problems == [
        Problem("steps", "4", "must be an odd number between 1 and 99", "steps: 7"),
        Problem("ratio", 2, "must be between 0 and 1", "ratio: 0.5"),
    ]


def test_off_in_a_yaml_is_a_word_where_it_is_allowed():
    assert check(probes=False)[0]["probes"] == "off"
    assert check(metric=False)[1] == [
        ("own_metric", "must be a text, one of local, global, both", "own_metric: local")
    ]


def test_help_holds_unit_and_range():
    metadata = Options.__dataclass_fields__["steps"].metadata
    assert metadata["help"] == "Steps. Unit: optimizer steps. Allowed: an odd number between 1 and 99."
    assert Options.__dataclass_fields__["flag"].metadata["help"] == "Flag."
    assert describe_allowed({}) == ""


def test_contradictions_are_what_the_options_own_check_lists():
    fault = Problem("steps", 3, "must fit ratio", "steps: 5")

    class Checked(Options):
        def check(self):
            return [fault]

    assert contradictions(Options()) == []
    assert contradictions(Checked()) == [fault]
