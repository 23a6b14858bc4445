"""Arms of a comparison: ways to fine-tune by name, and the settings of each run that follow from the user's YAML."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from llamafactory_adaptive.comparison.arm_methods import MIN_RANK, keys_that_stay, raised_min_rank
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.methods import methods


Settings = dict[str, Any]
PLAIN = "lora"  # tuned plain LoRA, the rival of all others; always in
CONTROL = "random"  # what unequal ranks cost or bring by themselves; always in
GIVEN = "yaml"  # the settings of the YAML as they are
# LLaMA-Factory's own variants of LoRA.
_VARIANTS: dict[str, Settings] = {
    PLAIN: {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "pissa": {"pissa_init": True, "pissa_convert": True},
}
_HALVES: dict[str, Settings] = {
    "tsq_ranks": {"adaptive_method": "tsq", "tsq_sampling": False},
    "tsq_samples": {"adaptive_method": "tsq", "tsq_reallocation": False},
}
# Starts computed from data, each on the ranks of its paper that are methods of ours.
_STARTS: dict[str, Settings] = {
    "eva": {"adaptive_method": "uniform", "adaptive_init": "eva"},
    "gora": {"adaptive_method": "gora_ranks", "adaptive_init": "gora"},
}
# ``by_type`` itself takes ranks by hand; as an arm it has those of another method's scores, one mean for every type.
_BY_TYPE: dict[str, Settings] = {
    "by_type": {"adaptive_method": "sensitivity", "adaptive_granularity": "type"},
}
# Keys of a variant, which an arm that does not name them is without, whatever the YAML says.
_KEYS_OF_VARIANTS = (*dict.fromkeys(key for keys in _VARIANTS.values() for key in keys), "loraplus_lr_embedding",
                     "pissa_iter")  # fmt: skip
_SWITCHES_OF_VARIANTS = ("use_rslora", "use_dora", "loraplus_lr_ratio", "pissa_init")
# What a run of a comparison does alike in every arm: no evaluation, no checkpoints, no reports, rows on the disk.
_FORCED: Settings = {
    "do_train": True, "do_eval": False, "do_predict": False, "eval_strategy": "no", "save_strategy": "no",
    "load_best_model_at_end": False, "report_to": "none", "plot_loss": False, "overwrite_output_dir": True,
    "push_to_hub": False, "disable_tqdm": True,
}  # fmt: skip
# Keys that are about evaluation, checkpoints or reports, or whose rows were split before. With ``data_seed`` the order
# of the rows would be the same for all seeds.
_LEFT_OUT = ("eval_dataset", "val_size", "eval_steps", "eval_on_each_dataset", "early_stopping_steps",
             "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "save_steps", "save_total_limit",
             "predict_with_generate", "compute_accuracy", "run_name", "output_dir", "logging_dir", "data_seed",
             "adaptive_best_model_from", "adapter_name_or_path", "create_new_adapter", "streaming", "eval_on_start",
             "eval_delay", "use_swanlab")  # fmt: skip
_LEFT_OUT_PREFIXES = ("swanlab_", "hub_", "push_to_hub_", "ray_")
_SPLIT_BY = ("eval_dataset", "val_size", "eval_on_each_dataset", "output_dir")  # used by the command itself
# What the command itself sets, by its own arguments.
_ONE_FOR_ALL = ("learning_rate", "lora_alpha", "lora_rank", "seed", "max_steps", "num_train_epochs", "stage",
                "model_name_or_path", "deepspeed", "fsdp", *_LEFT_OUT, *_FORCED)  # fmt: skip
# Every run trains on rows that were tokenised once, for all arms.
_ROW_KEYS = ("dataset", "dataset_dir", "template", "cutoff_len", "max_samples", "train_on_prompt", "mask_history",
            "packing", "neat_packing", "tokenized_path", "interleave_probs", "mix_strategy", "tool_format",
            "default_system", "enable_thinking", "overwrite_cache", "media_dir")  # fmt: skip
_NAME = re.compile(r"[\w][\w.\- ]{0,60}")
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)e[+-]?\d+", re.IGNORECASE)  # 5e-2 is a text to YAML
_EXAMPLE = '--arm "igu_off:adaptive_method=igu,igu_importance=off"'


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: what tables and plots call it.
        settings: keys that replace those of the YAML; ``finetuning_type`` is one of them.
        all_of_yaml: whether all adaptive keys and all variants of the YAML stay.
    """

    name: str
    settings: Settings = field(default_factory=dict)
    all_of_yaml: bool = False


@dataclass(frozen=True)
class GridPoint:
    """What is tuned for every arm on its own.

    Attributes:
        rate: ``learning_rate``.
        alpha: ``lora_alpha``; None for that of the YAML.
    """

    rate: float
    alpha: float | None = None

    def settings(self) -> Settings:
        """Return the keys of LLaMA-Factory that this point sets."""
        return {"learning_rate": self.rate} | ({} if self.alpha is None else {"lora_alpha": self.alpha})

    def __str__(self) -> str:
        return f"{self.rate:g}" + ("" if self.alpha is None else f", alpha {self.alpha:g}")


def choose_arms(names: Iterable[str], own: Iterable[str], given: Mapping[str, Any]) -> list[Arm]:
    """Build the arms that a user asks for: plain LoRA first, then the random control, then the others.

    Args:
        names: names of built-in arms.
        own: arms of the user, as :func:`parse_arm` reads them.
        given: settings of the YAML. Where they are adaptive, or of a variant of LoRA, they are an arm of their own.

    Raises:
        AdaptiveConfigError: an arm is unknown, or what is written is none.
    """
    built_in = built_in_arms()
    chosen = [PLAIN, CONTROL, *names]
    for name in chosen:
        if name not in built_in:
            (near,) = difflib.get_close_matches(name.lower(), built_in, n=1, cutoff=0.0)
            refuse("--arms", name, f"must be one of {', '.join(built_in)}", f"--arms {near}")
    arms = {name: built_in[name] for name in chosen}
    adaptive = given.get("finetuning_type") == "adaptive"
    if adaptive or any(given.get(key) for key in _SWITCHES_OF_VARIANTS):
        arms[GIVEN] = Arm(GIVEN, {"finetuning_type": "adaptive" if adaptive else "lora"}, all_of_yaml=True)
    for text in own:
        arm = parse_arm(text)
        if arm.name in arms:
            refuse("--arm", text, f"there is an arm called {arm.name} already", "another name before the colon")
        arms[arm.name] = arm
    return list(arms.values())


def with_lowest_ranks(
    arms: Sequence[Arm], given: Mapping[str, Any], own_keys: Iterable[str]
) -> tuple[list[Arm], dict[str, int]]:
    """Raise the ``adaptive_min_rank`` of arms whose method can do with none as low as the YAML's.

    What an arm sets by itself stays, and so do the settings of the YAML as they are.

    Returns:
        All arms, and by name of each one that was changed its lowest rank.
    """
    keys, fitted, raised = tuple(own_keys), [], dict[str, int]()
    for arm in arms:
        run = run_settings(given, arm, GridPoint(1.0), 0, None, keys)
        fixed = arm.all_of_yaml or MIN_RANK in arm.settings or run["finetuning_type"] != "adaptive"
        if not fixed and (lowest := raised_min_rank(run)) is not None:
            raised[arm.name] = lowest
            arm = replace(arm, settings={**arm.settings, MIN_RANK: lowest})
        fitted.append(arm)
    return fitted, raised


def without_twins(
    arms: Sequence[Arm], given: Mapping[str, Any], own_keys: Iterable[str]
) -> tuple[list[Arm], dict[str, str]]:
    """Remove arms whose runs have the settings of an earlier arm's, key by key.

    Returns:
        The arms that are kept, and by name of each one left out the name of the one that it equals.
    """
    keys, first, twins = tuple(own_keys), dict[str, Arm](), dict[str, str]()
    for arm in arms:
        settings = run_settings(given, arm, GridPoint(1.0), 0, None, keys)
        before = first.setdefault(json.dumps(settings, sort_keys=True, default=str), arm)
        if before is not arm:
            twins[arm.name] = before.name
    return list(first.values()), twins


def built_in_arms() -> dict[str, Arm]:
    """Return the arms that have a name: variants of LoRA, methods, the halves of TsqLoRA, starts from data."""
    kinds = {name: {"finetuning_type": "lora", **settings} for name, settings in _VARIANTS.items()}
    adaptive = {name: {"adaptive_method": name} for name in methods()} | _BY_TYPE | _HALVES | _STARTS
    kinds |= {name: {"finetuning_type": "adaptive", **settings} for name, settings in adaptive.items()}
    return {name: Arm(name, settings) for name, settings in kinds.items()}


def parse_arm(text: str) -> Arm:
    """Build an arm from ``NAME:key=value,key=value`` or ``NAME:{key: value, key: [value, value]}``, read as YAML.

    An arm that names an ``adaptive_method`` is adaptive. One that names neither a method nor a ``finetuning_type`` is
    plain LoRA with other settings.

    Raises:
        AdaptiveConfigError: the text has another form, or sets what is the same for all arms.
    """
    name, colon, rest = text.partition(":")
    if not colon or not _NAME.fullmatch(name):
        refuse("--arm", text, "must be NAME:key=value,... or NAME:{key: value, ...}", _EXAMPLE)
    pairs = _mapping(text, rest.strip()) if rest.strip().startswith("{") else _pairs(text, rest)
    settings = {key: _value(value) for key, value in pairs.items()}
    if tuned := [key for key in settings if key in _ONE_FOR_ALL or key.startswith(_LEFT_OUT_PREFIXES)]:
        reason, instead = f"{tuned[0]} is the same for all arms, or tuned for each", "--rates, --alphas or --steps"
        if "lora_rank" in tuned:
            reason = "lora_rank is one budget for all arms"
            instead = "lora_rank in the YAML, or `llamafactory-adaptive shrink --curve` for what smaller ranks keep"
        refuse("--arm", text, reason, instead)
    if rows := [key for key in settings if key in _ROW_KEYS]:
        refuse("--arm", text, f"{rows[0]} has no effect: all arms train on the same rows, tokenised once",
               f"{rows[0]} in the YAML, for all arms")  # fmt: skip
    kind = "adaptive" if "adaptive_method" in settings else "lora"
    return Arm(name, {"finetuning_type": kind, **settings})


def _mapping(text: str, rest: str) -> Settings:
    example = '--arm "qv:{lora_target: [q_proj, v_proj]}"'
    try:
        settings = yaml.safe_load(rest)
    except yaml.YAMLError as error:
        refuse("--arm", text, "what follows the colon cannot be read as YAML", example, cause=error)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        refuse("--arm", text, "what follows the colon must be {key: value, ...}", example)
    return settings


def _pairs(text: str, rest: str) -> Settings:
    pairs = [part.partition("=") for part in rest.split(",") if part.strip()]
    if wrong := [key for key, equals, _ in pairs if not equals or not key.strip().isidentifier()]:
        reason = f"{wrong[0]!r} is no key=value; a list needs the form NAME:{{key: [value, value]}}"
        refuse("--arm", text, reason, _EXAMPLE)
    try:
        return {key.strip(): yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        refuse("--arm", text, "a value cannot be read as YAML", _EXAMPLE, cause=error)


def _value(value: Any) -> Any:
    """Convert what YAML reads to what LLaMA-Factory's YAML would hold: names with commas, and numbers like 5e-2."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def run_settings(
    given: Mapping[str, Any], arm: Arm, point: GridPoint, seed: int, steps: int | None, own_keys: Iterable[str]
) -> Settings:
    """Build the settings of one run, without ``output_dir`` and ``tokenized_path``.

    Args:
        given: settings of the YAML.
        arm: way to fine-tune.
        point: what is tuned.
        seed: seed of the run: start of the adapter, order of the rows, dropout.
        steps: optimizer steps; None for those of the YAML.
        own_keys: those of the YAML's keys that are the plugin's.
    """
    adaptive = arm.settings["finetuning_type"] == "adaptive"
    dropped = {key for key in given if _is_left_out(key)}
    if not arm.all_of_yaml:
        dropped |= set(_KEYS_OF_VARIANTS)
    if not (adaptive and arm.all_of_yaml):
        dropped |= set(own_keys) - (keys_that_stay(given, arm.settings, own_keys) if adaptive else set())
    kept = {key: value for key, value in given.items() if key not in dropped}
    length = {} if steps is None else {"max_steps": steps}
    return {**kept, **_FORCED, **length, "seed": seed, **point.settings(), **arm.settings}


def _is_left_out(key: str) -> bool:
    return key in _LEFT_OUT or key.startswith(_LEFT_OUT_PREFIXES)


def keys_without_effect(given: Mapping[str, Any]) -> list[str]:
    """List the keys of the YAML that ask for something which no run of a comparison does."""
    asked = [key for key, value in given.items() if value not in (None, False, "none", "no") and key not in _SPLIT_BY]
    return [key for key in asked if _is_left_out(key) or (key in _FORCED and given[key] != _FORCED[key])]
