"""Files of settings that the board saves and loads: the plugin's fields are kept in a file beside the host's.

The host looks every id of its own file up among its components, and fails where it has none of that name: a board
without the plugin could not read a file with the plugin's ids in it.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
from llamafactory.webui.common import load_config

from llamafactory_adaptive.bridge.board.labels import message
from llamafactory_adaptive.bridge.board.option_fields import option_fields
from llamafactory_adaptive.bridge.board.seams import KIND
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import read_mapping, write_atomically
from llamafactory_adaptive.reports.plaintext import markdown


TAB = "adaptive"  # what the ids of the plugin's components begin with, before a dot
_TYPE_ID = "top.finetuning_type"


def elem_id(key: str) -> str:
    """Return the id of the component of a key."""
    return f"{TAB}.{key}"


def file_beside(path: str | Path) -> Path:
    """Return the name of the file that holds the plugin's fields, for a file of the host, whose whole name it has."""
    return Path(f"{path}.{TAB}.json")


def saving(original: Callable[[str, dict[str, Any]], None]) -> Callable[[str, dict[str, Any]], None]:
    """Wrap the host's ``save_args``: the plugin's fields that were changed go to a file of their own."""

    @wraps(original)
    def save_args(config_path: str, config_dict: dict[str, Any]) -> None:
        original(config_path, {key: value for key, value in config_dict.items() if not key.startswith(f"{TAB}.")})
        beside = file_beside(config_path)
        if config_dict.get(_TYPE_ID) == KIND:
            held = {field.key: config_dict.get(elem_id(field.key), field.blank) for field in option_fields()}
            changed = {field.key: held[field.key] for field in option_fields() if held[field.key] != field.blank}
            write_atomically(beside, json.dumps(changed, indent=1) + "\n")
        else:
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    return save_args


def loading(original: Callable[[str], dict[str, Any] | None]) -> Callable[[str], dict[str, Any] | None]:
    """Wrap the host's ``load_args``: with adaptive settings, every field of the plugin gets a value.

    What is lost of the plugin's fields is told, and is at its default then.
    """

    @wraps(original)
    def load_args(config_path: str) -> dict[str, Any] | None:
        loaded = original(config_path)
        if not isinstance(loaded, dict) or loaded.get(_TYPE_ID) != KIND:
            return loaded
        return {**loaded, **_fields_beside(config_path)}

    return load_args


def _fields_beside(config_path: str) -> dict[str, Any]:
    beside = file_beside(config_path)
    stored: dict[str, Any] | None
    try:
        stored = read_mapping(beside, str(beside))
    except (PlanError, OSError):
        stored = None
    values = {field.key: field.blank for field in option_fields()}
    values |= {f.key: f.admitted(stored[f.key]) for f in option_fields() if stored and f.key in stored}
    if stored is None or any(key not in values or values[key] != value for key, value in stored.items()):
        gr.Warning(message("settings_lost", load_config().get("lang") or "en", file=markdown(str(beside))))
    return {elem_id(key): value for key, value in values.items()}
