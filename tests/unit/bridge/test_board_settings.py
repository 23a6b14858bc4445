"""What the board's panel offers, says and writes: everything but the components."""

import dataclasses
import inspect
import re
import string
import tomllib
from pathlib import Path

import pytest

from llamafactory_adaptive.bridge.arguments import _generated_fields
from llamafactory_adaptive.bridge.board import labels
from llamafactory_adaptive.bridge.board.option_fields import (
    OptionField,
    _fields_of,
    changed_settings,
    keys_of,
    option_fields,
)
from llamafactory_adaptive.config.arguments import PRUNING_KEYS
from llamafactory_adaptive.config.key_checks import CALIBRATION_KEYS
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.methods import get_method, methods
from llamafactory_adaptive.options import option
from llamafactory_adaptive.ranks.plan import RankPlan


LANGUAGES = {"en", "ru", "zh", "ko", "ja"}
BLANK = {field.key: field.blank for field in option_fields()}
TABLES = tomllib.loads(Path(labels.__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def test_every_key_of_the_plugin_has_one_field():
    assert sorted(BLANK) == sorted(name for name, *_ in _generated_fields())
    assert len(BLANK) == len(_generated_fields())


@pytest.mark.parametrize("method", sorted(methods()))
def test_a_method_is_offered_its_own_options_and_those_of_all_that_it_reads(method):
    own = {f"{method}_{entry.name}" for entry in dataclasses.fields(get_method(method).Options)}
    keys = keys_of(method)
    others = {field.key for field in option_fields() if field.method not in ("", method)}
    assert own <= keys
    assert not others & keys
    assert "adaptive_method" in keys


def test_options_without_effect_are_not_offered():
    assert not set(PRUNING_KEYS) & keys_of("sensitivity")
    assert set(PRUNING_KEYS) <= keys_of("igu")
    assert not set(CALIBRATION_KEYS) & keys_of("igu")
    assert {"adaptive_init", "adaptive_init_gamma"} <= keys_of("sensitivity")
    assert not {"adaptive_init", "adaptive_init_gamma"} & keys_of("igu")


@pytest.mark.parametrize("method", sorted(methods()))
def test_defaults_stay_out_of_the_settings(method):
    expected = {} if method == "sensitivity" else {"adaptive_method": method}
    assert changed_settings({**BLANK, "adaptive_method": method}) == expected


def test_what_was_changed_is_written_with_its_type_and_what_the_method_does_not_read_is_not():
    held = {
        **BLANK, "adaptive_method": "igu", "adaptive_min_rank": 0, "adaptive_init_rank": "12", "igu_descale": "false",
        "igu_epsilon": "2", "adaptive_calibration_samples": 7, "sensitivity_metric": "trace",
    }  # fmt: skip
    written = changed_settings(held)
    assert written == {
        "adaptive_method": "igu", "adaptive_min_rank": 0, "adaptive_init_rank": 12, "igu_descale": False,
        "igu_epsilon": 2.0,
    }  # fmt: skip
    assert isinstance(written["adaptive_init_rank"], int)


def test_a_wrong_value_is_told_with_its_key_and_a_value_to_try():
    with pytest.raises(AdaptiveConfigError, match=r"adaptive_min_rank: -1 is invalid: must be .*at least 0.*try"):
        changed_settings({**BLANK, "adaptive_min_rank": -1})
    with pytest.raises(AdaptiveConfigError, match="adaptive_method"):
        changed_settings({**BLANK, "adaptive_method": "nosuch"})


@pytest.mark.parametrize("field", option_fields(), ids=lambda field: field.key)
def test_a_field_shows_its_default_and_nothing_that_it_could_not_send(field):
    assert field.admitted(field.blank) == field.blank
    assert field.admitted(["no", "value"]) == field.blank
    if field.choices:
        assert field.admitted("no such word") == field.blank


def test_a_method_of_another_package_needs_no_code_here():
    @dataclasses.dataclass
    class Options:
        strength: float | None = option(None, "How strong.", low=0.0)
        careful: bool = option(True, "Whether it is.")
        style: str = option("plain", "Which.", choices=("plain", "bold"))

    kinds = {field.key: (field.kind, field.blank, field.choices) for field in _fields_of(Options, "mine")}
    assert kinds == {
        "mine_strength": (float, "", ()),
        "mine_careful": (bool, True, ()),
        "mine_style": (str, "plain", ("plain", "bold")),
    }


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [(kind, name) for kind in TABLES for name in TABLES[kind]], ids=".".join)
def test_every_text_is_there_in_five_languages_with_the_same_values_to_fill_in(entry):
    kind, name = entry
    texts = TABLES[kind][name]
    assert set(texts) == LANGUAGES
    filled = {lang: {part for _, part, *_ in string.Formatter().parse(text) if part} for lang, text in texts.items()}
    assert all(values == filled["en"] for values in filled.values())
    assert all(text.strip() for text in texts.values())


def test_every_message_is_shown_by_something():
    rooms = [path.read_text("utf-8") for path in Path(labels.__file__).parent.glob("*.py")]
    source = "\n".join([*rooms, inspect.getsource(RankPlan)])  # what a budget counts is named there
    assert set(TABLES["message"]) <= set(re.findall(r"[\"'](\w+)[\"']", source))


def test_labels_of_options_are_of_options_that_there_are():
    assert set(TABLES["option"]) == {field.key for field in option_fields() if not field.method}
    names = {field.key.removeprefix(f"{field.method}_") for field in option_fields() if field.method}
    assert set(TABLES["method_option"]) == names


def test_an_option_of_another_package_is_called_by_its_name():
    field = OptionField("mine_probe_interval", "mine", int, 1, "Steps.")
    assert labels.label_of(field) == "Steps between probes", "a name that is known means the same"
    field = OptionField("mine_own_thing", "mine", int, 1, "Whatever it is.")
    assert labels.label_of(field) == "own thing"
    assert labels.explanation_of(field) == "mine_own_thing: Whatever it is."


def test_the_options_of_a_method_are_told_apart():
    shown = [(field.method, labels.label_of(field)) for field in option_fields()]
    assert len(set(shown)) == len(shown)
