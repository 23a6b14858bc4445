"""The user's side of the plugin: YAML keys with their help, the validated configuration, and the error classes.

Pure standard library. Every check runs before anything expensive starts and all problems are reported at once.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
        "sensitivity",
        "How ranks are found: sensitivity (before training), igu, adalora or tsq (while training), uniform, random.",
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
    adaptive_init_rank: int | None = option(
        None, "Rank every module starts with, for methods that prune (default: 2 x lora_rank).", unit="rank", low=2
    )
    adaptive_warmup_ratio: float = option(
        0.1, "Share of the optimizer steps before the first pruning.", low=0.0, high=0.99
    )
    adaptive_final_ratio: float = option(
        0.3, "Share of the optimizer steps, at the end, that train the final ranks.", low=0.0, high=0.99
    )
    adaptive_interval: int = option(
        10, "Optimizer steps between two allocations of a method that prunes.", unit="steps", low=1
    )
    adaptive_max_overhead: float | None = option(
        None,
        "Largest share of training time that extra passes of a pruning method may add; they are thinned out to fit "
        "(default: no limit, which keeps runs reproducible).",
        low=0.001,
        high=10.0,
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
class PruningConfig:
    """How a dynamic method goes from its over-ranked start to the budget. Ratios are of all optimizer steps."""

    init_rank: int
    warmup_ratio: float
    final_ratio: float
    interval: int
    max_overhead: float | None
    seed: int

    @property
    def live_rank(self) -> int:
        """Rank of the tensors that train."""
        return self.init_rank


@dataclass(frozen=True)
class ReallocationConfig:
    """How a dynamic method moves ranks about under a constant budget.

    Attributes:
        live_rank: rank of the tensors that train: what a module can grow to.
        refresh_ratio: share of all optimizer steps between two allocations.
        seed: of the factors.
    """

    live_rank: int
    refresh_ratio: float
    seed: int


# Keys that only methods which prune during training read.
PRUNING_KEYS = (
    "adaptive_init_rank",
    "adaptive_warmup_ratio",
    "adaptive_final_ratio",
    "adaptive_interval",
    "adaptive_max_overhead",
)


@dataclass(frozen=True)
class AdaptiveConfig:
    """The validated configuration of one run. Ranks are in rank units, ``lora_rank`` is the budget.

    ``course`` tells how ranks change while training; None where they are fixed before.
    """

    method: str
    options: Mapping[str, Any]
    budget_unit: str
    lora_rank: int
    lora_alpha: float
    min_rank: int
    max_rank: int
    plan_path: str | None
    calibration: CalibrationConfig
    course: PruningConfig | ReallocationConfig | None = None

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
        value = values[key]
        if value is False and "off" in (entry.metadata.get("choices") or ()):
            value = "off"  # what YAML makes of the word
        try:
            result[entry.name] = coerce(value, hints[entry.name])
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
