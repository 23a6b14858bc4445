"""The user's side of the plugin: YAML keys with their help, the validated configuration, and the error classes.

Pure standard library. Every check runs before anything expensive starts and all problems are reported at once.
"""

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class AdaptiveError(Exception):
    """A failure the user can act on; the command line prints it without a traceback and exits with 2."""


@dataclass(frozen=True)
class Problem:
    """One wrong setting: what it is, what would be allowed, and a value to try."""

    key: str
    value: Any
    allowed: str
    suggestion: str

    def __str__(self) -> str:
        return f"{self.key}: {self.value!r} is not possible: {self.allowed}; try {self.suggestion}"


class AdaptiveConfigError(AdaptiveError, ValueError):
    """Wrong configuration, found before any model was loaded. Holds every problem, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} problems in the configuration:{lines}"


class InfeasibleBudgetError(AdaptiveError, ValueError):
    """The rank bounds leave no allocation within the budget."""


class PlanError(AdaptiveError, ValueError):
    """A rank plan that cannot be read, or does not fit the model or the budget."""


class CalibrationError(AdaptiveError, RuntimeError):
    """Calibration could not produce trustworthy statistics."""


class SeamError(AdaptiveError, RuntimeError):
    """The installed LLaMA-Factory does not offer what the plugin attaches to."""


class GuardError(AdaptiveError, RuntimeError):
    """A run that was asked to be adaptive did not train or save what its plan says."""


def option(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    odd: bool = False,
) -> Any:
    """Declare one key: default, help text, unit and the closed range ``[low, high]`` or the allowed words.

    ``default`` may be callable (a ``default_factory``). The range is part of the generated help.
    """
    rules = {"low": low, "high": high, "choices": choices, "odd": odd}
    allowed = describe_allowed(rules)
    text = help + (f" Unit: {unit}." if unit else "") + (f" Allowed: {allowed}." if allowed else "")
    return field(default=default, metadata={"help": text, **rules})


def describe_allowed(rules: Mapping[str, Any]) -> str:
    """Say a field's allowed values in words."""
    if rules.get("choices"):
        return "one of " + ", ".join(rules["choices"])
    low, high = rules.get("low"), rules.get("high")
    if low is not None and high is not None:
        text = f"between {low:g} and {high:g}"
    elif low is not None:
        text = f"at least {low:g}"
    else:
        text = f"at most {high:g}" if high is not None else ""
    return text + (" and odd" if rules.get("odd") else "")


@dataclass
class AdaptiveArguments:
    """Keys of ``finetuning_type: adaptive`` that hold for every method. ``lora_rank`` is the budget."""

    adaptive_method: str = option(
        "sensitivity", "How ranks are allocated: a registered method, such as sensitivity, uniform or random."
    )
    adaptive_budget_unit: str = option(
        "params",
        "What lora_rank bounds: trainable parameters of a uniform LoRA of that rank, or its sum of ranks.",
        choices=("params", "ranks"),
    )
    adaptive_min_rank: int = option(
        1, "Lowest rank of a module; 0 lets a module go without an adapter.", unit="rank", low=0
    )
    adaptive_max_rank: int | None = option(
        None, "Highest rank of a module (default: 4 x lora_rank).", unit="rank", low=1
    )
    adaptive_plan: str | None = option(
        None, "Path of a saved adaptive_rank_plan.json to train on; nothing is computed then."
    )
    adaptive_calibration_dataset: str | None = option(
        None,
        "Data for scoring: name(s) in dataset_info.json, comma separated (default: the training set). "
        "Only training splits are accepted.",
    )
    adaptive_calibration_samples: int = option(
        128, "Number of samples drawn for scoring.", unit="samples", low=1, high=1_000_000
    )
    adaptive_calibration_batch_size: int = option(
        8, "Samples per forward pass while scoring.", unit="samples", low=1, high=65_536
    )
    adaptive_calibration_seed: int | None = option(
        None, "Seed of the calibration draw and of the random method (default: the run's seed).", low=0
    )


@dataclass(frozen=True)
class CalibrationConfig:
    """Which samples a method scores on."""

    dataset: str | None
    samples: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class AdaptiveConfig:
    """The validated configuration of one run. Ranks are in rank units, ``lora_rank`` is the budget."""

    method: str
    options: Mapping[str, Any]
    budget_unit: str
    lora_rank: int
    lora_alpha: float
    min_rank: int
    max_rank: int
    plan_path: str | None
    calibration: CalibrationConfig

    @property
    def scale(self) -> float:
        """LoRA scale alpha/r, the same for every module."""
        return self.lora_alpha / self.lora_rank


def coerce(value: Any, annotation: Any) -> Any:
    """Turn a YAML or command-line value into the annotated type; raise ValueError if it has another meaning."""
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


_TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def check_fields(owner: type, prefix: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Check the flat keys of one dataclass of options.

    Args:
        owner: a dataclass whose fields were made by :func:`option`.
        prefix: what stands before a field's name in the YAML (``"sensitivity_"``).
        values: the flat YAML mapping; other keys are ignored.

    Returns:
        Field name to typed value, defaults filled in, and the problems found.
    """
    hints = typing.get_type_hints(owner)
    result: dict[str, Any] = {}
    problems: list[Problem] = []
    for entry in dataclasses.fields(owner):
        key, default = prefix + entry.name, entry.default
        result[entry.name] = default
        if key not in values or values[key] is None:
            continue
        try:
            result[entry.name] = coerce(values[key], hints[entry.name])
            fault = _range_fault(result[entry.name], entry.metadata)
        except (ValueError, TypeError, OverflowError):
            kind = next(word for kind, word in _TYPE_WORDS.items() if kind is _plain_type(hints[entry.name]))
            fault = ", ".join(part for part in (f"it must be {kind}", describe_allowed(entry.metadata)) if part)
        if fault:
            result[entry.name] = default
            problems.append(Problem(key, values[key], fault, _suggest(key, values[key], entry)))
    return result, problems


def _plain_type(annotation: Any) -> Any:
    arms = [arm for arm in typing.get_args(annotation) if arm is not type(None)]
    return arms[0] if arms else annotation


def _range_fault(value: Any, rules: Mapping[str, Any]) -> str:
    """Empty when ``value`` obeys the field's rules, else the rule in words."""
    choices, low, high = rules.get("choices"), rules.get("low"), rules.get("high")
    bad = (
        (choices and value not in choices)
        or (low is not None and value is not None and value < low)
        or (high is not None and value is not None and value > high)
        or (rules.get("odd") and value % 2 == 0)
    )
    return f"it must be {describe_allowed(rules)}" if bad else ""


def _suggest(key: str, value: Any, entry: "dataclasses.Field[Any]") -> str:
    choices = entry.metadata.get("choices")
    if choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        return f"{key}: {near[0] if near else choices[0]}"
    return f"leaving {key} out" if entry.default is None else f"{key}: {entry.default}"


def unknown_key_problems(given: Mapping[str, Any], known: Iterable[str]) -> list[Problem]:
    """One problem per key nobody reads, with the nearest known key."""
    names = set(known)
    problems = []
    for key, value in given.items():
        if key not in names:
            near = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.6)
            hint = near[0] if near else "leaving it out"
            problems.append(Problem(key, value, "neither LLaMA-Factory nor this plugin has such a key", hint))
    return problems


@dataclass(frozen=True)
class Conflict:
    """An upstream option that cannot go together with ``finetuning_type: adaptive``."""

    key: str
    clashes: Callable[[Mapping[str, Any]], bool]
    reason: str
    suggestion: str


def _on(key: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda flat: bool(flat.get(key))


def _deepspeed_stage(flat: Mapping[str, Any]) -> int:
    """ZeRO stage of the named configuration; 0 without one."""
    try:
        document = json.loads(Path(str(flat.get("deepspeed"))).read_text(encoding="utf-8"))
        return int(document.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError):
        return 0


CONFLICTS = (
    Conflict(
        "use_rslora",
        _on("use_rslora"),
        "rsLoRA scales by sqrt(rank), so mixed ranks would be scaled unevenly",
        "use_rslora: false",
    ),
    Conflict("use_dora", _on("use_dora"), "DoRA magnitudes are not served right at mixed ranks", "use_dora: false"),
    Conflict("pissa_init", _on("pissa_init"), "PiSSA changes the base weights per rank", "pissa_init: false"),
    Conflict("use_unsloth", _on("use_unsloth"), "Unsloth takes one rank for all modules", "use_unsloth: false"),
    Conflict("use_kt", _on("use_kt"), "KTransformers takes one rank for all modules", "use_kt: false"),
    Conflict(
        "use_hyper_parallel",
        _on("use_hyper_parallel"),
        "HyperParallel trains full parameters only",
        "use_hyper_parallel: false",
    ),
    Conflict(
        "train_from_scratch",
        _on("train_from_scratch"),
        "random weights have no sensitivity to measure",
        "train_from_scratch: false",
    ),
    Conflict(
        "mixture_of_depths",
        lambda flat: flat.get("mixture_of_depths") is not None,
        "Mixture-of-Depths wraps the layers that ranks are planned for",
        "leaving mixture_of_depths out",
    ),
    Conflict(
        "stage",
        lambda flat: flat.get("stage") == "ppo",
        "ranks are planned for pt, sft, rm, dpo and kto",
        "stage: dpo",
    ),
    Conflict(
        "fsdp",
        lambda flat: bool(flat.get("fsdp")) or os.environ.get("ACCELERATE_USE_FSDP") == "true",
        "FSDP flattens the factors whose ranks are checked",
        "deepspeed: examples/deepspeed/ds_z3_config.json",
    ),
    Conflict(
        "create_new_adapter",
        lambda flat: (
            bool(flat.get("create_new_adapter") and flat.get("adapter_name_or_path"))
            and (flat.get("quantization_bit") is not None or _deepspeed_stage(flat) == 3)
        ),
        "the old adapter cannot be merged into a quantised base or under ZeRO-3",
        "merging it first with llamafactory-cli export",
    ),
    Conflict(
        "quantization_method",
        lambda flat: (
            flat.get("quantization_bit") is not None and flat.get("quantization_method", "bnb") not in ("bnb", "BNB")
        ),
        "only bitsandbytes quantisation is supported",
        "quantization_method: bnb",
    ),
    Conflict(
        "quantization_bit",
        lambda flat: flat.get("quantization_bit") not in (None, 4, 8, "4", "8"),
        "bitsandbytes knows 4 and 8",
        "quantization_bit: 4",
    ),
)


def check_conflicts(flat: Mapping[str, Any]) -> list[Problem]:
    """Problems between upstream options and the adaptive run."""
    return [
        Problem(rule.key, flat.get(rule.key), rule.reason, rule.suggestion) for rule in CONFLICTS if rule.clashes(flat)
    ]


def check_budget(flat: Mapping[str, Any], common: Mapping[str, Any]) -> tuple[int, float, int, list[Problem]]:
    """Check ``lora_rank``, ``lora_alpha`` and the rank bounds against each other.

    Returns:
        ``lora_rank``, ``lora_alpha`` (default 2 x rank, as upstream), the effective upper bound, the problems.
    """
    problems: list[Problem] = []
    rank = _positive_int(flat, "lora_rank", 8, problems)
    alpha = _positive_int(flat, "lora_alpha", 2 * rank, problems)
    low, high = common["adaptive_min_rank"], common["adaptive_max_rank"] or 4 * rank
    if high < rank:
        problems.append(
            Problem(
                "adaptive_max_rank",
                high,
                f"it must be at least lora_rank ({rank}), or the budget cannot be spent",
                f"adaptive_max_rank: {4 * rank}",
            )
        )
    if low > rank:
        problems.append(
            Problem(
                "adaptive_min_rank",
                low,
                f"it must be at most lora_rank ({rank}), or the budget is overspent",
                "adaptive_min_rank: 1",
            )
        )
    return rank, float(alpha), high, problems


def _positive_int(flat: Mapping[str, Any], key: str, default: int, problems: list[Problem]) -> int:
    value = flat.get(key)
    if value is None:
        return default
    try:
        number = int(coerce(value, int))
    except (ValueError, TypeError, OverflowError):
        number = 0
    if number < 1:
        problems.append(Problem(key, value, "it must be a whole number of at least 1", f"{key}: {default}"))
        return default
    return number
