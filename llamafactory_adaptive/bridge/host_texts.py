"""Checks of the host's keys that take a text: values of another type, and paths that no file can have.

A YAML gives numbers, lists and mappings as readily as texts, and the host fails only where it uses one. These keys are
checked first, so that every other check can rely on texts.
"""

from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.config.deepspeed_settings import is_inline
from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.paths import impossible_path


# What each key takes besides a text; lists are of texts.
_PATHS: dict[str, tuple[type, ...]] = {
    "model_name_or_path": (),
    "adapter_name_or_path": (),
    "output_dir": (),
    "tokenized_path": (),
    "cache_dir": (),
    "media_dir": (),
    "ref_model": (),
    "reward_model": (),
    "adaptive_plan": (),
    "resume_from_checkpoint": (bool,),
    "dataset_dir": (dict,),
    "deepspeed": (dict,),
}
_NAMES: dict[str, tuple[type, ...]] = {
    "template": (),
    "dataset": (list,),
    "eval_dataset": (list,),
    "lora_target": (list,),
    "additional_target": (list,),
    "report_to": (list,),
}
_WORDS = {list: "a list of texts", dict: "a mapping", bool: "true or false"}


def text_problems(args: Mapping[str, Any]) -> list[Problem]:
    """Find values that should be texts and are not, and paths too long for a file or with a zero byte in them."""
    problems = []
    for key, others in (_PATHS | _NAMES).items():
        value = args.get(key)
        if value is None:
            continue
        if not _fits(value, others):
            allowed = "must be " + " or ".join(["a text", *(_WORDS[kind] for kind in others)])
            quoted = isinstance(value, (int, float)) and not isinstance(value, bool)
            problems.append(Problem(key, value, allowed, f'{key}: "{value}"' if quoted else f'{key}: "<text>"'))
        elif key in _PATHS and isinstance(value, str) and not is_inline(value) and (why := impossible_path(value)):
            problems.append(Problem(key, value, why, "another path"))
    return problems


def _fits(value: Any, others: tuple[type, ...]) -> bool:
    if isinstance(value, list):
        return list in others and all(isinstance(entry, str) for entry in value)
    return isinstance(value, (str, *others))
