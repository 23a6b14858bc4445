"""The texts of the board's panel and tab, from ``labels.toml``. Options keep the help that they were declared with."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.board.option_fields import OptionField, option_fields


Texts = dict[str, str]


@cache
def _tables() -> dict[str, dict[str, Texts]]:
    tables: dict[str, dict[str, Texts]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    return tables


def message(name: str, lang: str, **values: Any) -> str:
    """Return a message in one of the board's languages, English where the language is unknown."""
    texts = _tables()["message"][name]
    return texts.get(lang, texts["en"]).format(**values)


def locales() -> dict[str, dict[str, dict[str, str]]]:
    """Build the table that the board looks texts up in: component, then language, then what it sets."""
    tables = _tables()
    table = {component_name(name): _entry("label", texts) for name, texts in tables["label"].items()}
    table |= {component_name(name): _entry("value", texts) for name, texts in tables["button"].items()}
    return table | {field.key: _entry("label", texts) for field in option_fields() if (texts := _texts_of(field))}


def _texts_of(field: OptionField) -> Texts | None:
    tables = _tables()
    own = tables["method_option"].get(_own_name(field)) if field.method else None
    return tables["option"].get(field.key, own)


def _own_name(field: OptionField) -> str:
    return field.key.removeprefix(f"{field.method}_")


def _entry(what: str, texts: Texts) -> dict[str, dict[str, str]]:
    return {lang: {what: text} for lang, text in texts.items()}


def component_name(name: str) -> str:
    """Return the name of a component in the board, where every name has one text whatever tab it is on."""
    return f"adaptive_{name}"


def english(name: str) -> str:
    """Return what a component says before the board chooses a language."""
    tables = _tables()
    return (tables["label"].get(name) or tables["button"][name])["en"]


def label_of(field: OptionField) -> str:
    """Return the label of an option: from the tables, or where they have none, its name without the method's."""
    texts = _texts_of(field)
    return texts["en"] if texts else _own_name(field).replace("_", " ")


def explanation_of(field: OptionField) -> str:
    """Return what stands beside an option: its key, and its help."""
    return f"{field.key}: {field.help}"
