"""Checks of the Python API's arguments, by the rules of the YAML keys; messages use the Python names."""

import ast
import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.key_checks import check_budget
from llamafactory_adaptive.errors import AdaptiveConfigError, AdaptiveError, Problem, refuse, refuse_all
from llamafactory_adaptive.methods import get_method, is_dynamic, methods, nearest
from llamafactory_adaptive.options import check_fields, contradictions
from llamafactory_adaptive.versions import installed_versions


# Names in messages of other packages, and the API's names for the same things.
_PYTHON_NAMES = {
    "adaptive_calibration_batch_size": "batch_size",
    "adaptive_calibration_samples": "the number of rows",
    "lora_target": "target_modules",
}
# Arguments of the API and of a Trainer that are called as their YAML keys are.
_SAME_NAMES = ("lora_rank", "lora_alpha", "bf16", "fp16", "load_best_model_at_end", "eval_steps", "save_strategy",
               "learning_rate")  # fmt: skip


def chosen_method(name: str, options: Mapping[str, Any], dynamic: bool) -> tuple[type[Any], dict[str, Any]]:
    """Look a method up and check its options.

    Args:
        name: as registered.
        options: by the names of the method's ``Options``, without a prefix.
        dynamic: whether a method is wanted that finds ranks while training.

    Returns:
        The class, and every option with its value.

    Raises:
        AdaptiveConfigError: no such method, one of the other kind, or options it does not have or allow.
    """
    if name not in methods():
        known = [each for each in sorted(methods()) if is_dynamic(get_method(each)) == dynamic]
        refuse("method", name, f"must be one of {', '.join(known)}", f"method={nearest(str(name))!r}")
    cls = get_method(name)
    if is_dynamic(cls) != dynamic:
        reason, remedy = _OTHER_KIND[dynamic]
        refuse("method", name, reason, remedy.format(name=name))
    known = [entry.name for entry in dataclasses.fields(cls.Options)]
    unknown = [_unknown_option(name, key, value, known) for key, value in options.items() if key not in known]
    values, faults = check_fields(cls.Options, "", options)
    refuse_all(*unknown, *(in_python(fault, name) for fault in faults))
    refuse_all(*(in_python(fault, name) for fault in contradictions(cls.Options(**values))))
    return cls, values


_OTHER_KIND = {
    True: ("it finds its ranks before training", "score_modules(model, batches, method={name!r})"),
    False: ("it finds its ranks while training, from no scores", "rank_search(model, method={name!r})"),
}


def _unknown_option(method: str, key: str, value: Any, known: list[str]) -> Problem:
    near = difflib.get_close_matches(key, known, n=1)
    has = f"the method {method} has the options {', '.join(known)}" if known else f"the method {method} has no options"
    return Problem(key, value, has, f"{near[0]}=..." if near else f"leaving {key} out")


def common_settings(method: str, **given: Any) -> tuple[dict[str, Any], list[Problem]]:
    """Check types and ranges of arguments whose YAML keys are ``adaptive_<name>``.

    Returns:
        The values of all those keys, defaults filled in, and the problems.
    """
    flat = {f"adaptive_{name}": value for name, value in given.items()}
    values, faults = check_fields(AdaptiveArguments, "", flat)
    return values, [in_python(fault, method) for fault in faults]


def budget_settings(
    method: str, lora_rank: int, lora_alpha: int | None, common: Mapping[str, Any]
) -> tuple[int, float, int, list[Problem]]:
    """Check the budget against the bounds; return ``lora_rank``, ``lora_alpha``, the largest rank, the problems."""
    rank, alpha, high, faults = check_budget({"lora_rank": lora_rank, "lora_alpha": lora_alpha}, common)
    return rank, alpha, high, [in_python(fault, method) for fault in faults]


def in_python(problem: Problem, method: str) -> Problem:
    """Rewrite a problem in Python's notation: ``igu_intervals: 20`` becomes ``intervals=20``."""
    said = (python_words(text, method, (problem.key,)) for text in (problem.allowed, problem.suggestion))
    return replace(problem, key=python_words(problem.key, method), allowed=next(said), suggestion=next(said))


def python_words(text: str, method: str, also: Iterable[str] = ()) -> str:
    """Replace YAML keys by the names of arguments; ``also`` are further keys that a value may follow."""
    short = {**_short_names(method), **_PYTHON_NAMES}
    names = "|".join(re.escape(name) for name in (*short, *_SAME_NAMES, *also))
    text = re.sub(rf"\b({names}): (\S+?)(?=[,;)]|$|\s)", lambda m: f"{m[1]}={_literal(m[2])}", text)
    # Not within the name of a file or folder, such as adaptive_plan.json.
    return re.sub(rf"(?<![\w/.-])({'|'.join(short)})(?![\w/-]|\.\w)", lambda m: short[m[1]], text)


def _short_names(method: str) -> dict[str, str]:
    """Map the keys that hold for every method, and those of one method, to the names without their prefix."""
    common = {field.name: field.name.removeprefix("adaptive_") for field in dataclasses.fields(AdaptiveArguments)}
    return common | {f"{method}_{field.name}": field.name for field in dataclasses.fields(get_method(method).Options)}


@contextmanager
def python_errors(method: str) -> Iterator[None]:
    """Rewrite the messages of errors that the context raises in Python's notation; their types stay."""
    try:
        yield
    except AdaptiveConfigError as error:
        error.problems = tuple(in_python(problem, method) for problem in error.problems)
        raise
    except AdaptiveError as error:
        error.args = (python_words(str(error), method),)
        raise


def _literal(value: str) -> str:
    """Convert a YAML value to a Python literal."""
    value = {"true": "True", "false": "False", "null": "None"}.get(value, value)
    try:
        return repr(ast.literal_eval(value))
    except (ValueError, SyntaxError):
        return repr(value)


def provenance(model: nn.Module, seed: int) -> dict[str, Any]:
    """Collect the provenance of a plan: base model, architecture, seed and versions of packages."""
    return {
        "base_model": str(getattr(model, "name_or_path", "")),
        "architecture": type(model).__name__,
        "seed": seed,
        "versions": installed_versions(_PACKAGES),
    }


_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "llamafactory-adaptive")
