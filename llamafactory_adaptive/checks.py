"""Checks between keys: unknown names, the budget against its bounds, host options that cannot go with adaptive ranks.

Pure standard library, on the flat mapping of a run's settings.
"""

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.config import PRUNING_KEYS, Problem, PruningConfig, coerce


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


def _deepspeed_document(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The named or in-line configuration; empty without one."""
    given = flat.get("deepspeed")
    try:
        document = given if isinstance(given, dict) else json.loads(Path(str(given)).read_text(encoding="utf-8"))
        return document if isinstance(document, dict) else {}
    except (OSError, ValueError):
        return {}


def _deepspeed_stage(flat: Mapping[str, Any]) -> int:
    """ZeRO stage; 0 without DeepSpeed."""
    return int(_deepspeed_document(flat).get("zero_optimization", {}).get("stage", 0))


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
        "load_best_model_at_end",
        lambda flat: flat.get("stage") == "rm" and bool(flat.get("load_best_model_at_end")),
        "the Trainer cannot load the value-head checkpoints that LLaMA-Factory writes",
        "load_best_model_at_end: false",
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
    return _clashes(CONFLICTS, flat)


def _clashes(rules: Iterable[Conflict], flat: Mapping[str, Any]) -> list[Problem]:
    return [
        Problem(rule.key, flat.get(rule.key), rule.reason, rule.suggestion) for rule in rules if rule.clashes(flat)
    ]


CALIBRATION_KEYS = (
    "adaptive_calibration_dataset",
    "adaptive_calibration_samples",
    "adaptive_calibration_batch_size",
    "adaptive_calibration_seed",
)


def check_kind(flat: Mapping[str, Any], method: str, dynamic: bool) -> list[Problem]:
    """Keys of static methods given to one that prunes during training, or the reverse: they would do nothing."""
    idle, reason, other = (
        (CALIBRATION_KEYS, "finds ranks during training and calibrates nothing", "sensitivity")
        if dynamic
        else (PRUNING_KEYS, "fixes ranks before training and prunes nothing", "igu")
    )
    return [
        Problem(key, flat[key], f"adaptive_method: {method} {reason}", f"leaving it out, or adaptive_method: {other}")
        for key in idle
        if flat.get(key) is not None
    ]


def check_pruning(
    common: Mapping[str, Any], lora_rank: int, max_rank: int, seed: int
) -> tuple[PruningConfig, list[Problem]]:
    """The schedule of a dynamic method, checked against the budget."""
    problems = []
    given = common["adaptive_init_rank"]
    init_rank = min(2 * lora_rank, max_rank) if given is None else given
    if not lora_rank < init_rank <= max_rank:
        key = "adaptive_max_rank" if given is None else "adaptive_init_rank"
        reason = (
            f"the start must be over-ranked: above lora_rank ({lora_rank}), at most adaptive_max_rank ({max_rank})"
        )
        value = max_rank if given is None else given
        problems.append(Problem(key, value, reason, f"{key}: {2 * lora_rank}"))
    ratios = {"adaptive_warmup_ratio": common["adaptive_warmup_ratio"],
              "adaptive_final_ratio": common["adaptive_final_ratio"]}  # fmt: skip
    if sum(ratios.values()) >= 1.0:
        larger, smaller = sorted(ratios, key=lambda key: -ratios[key])
        reason = f"with {smaller} {ratios[smaller]:g} it leaves no step to prune in"
        problems.append(Problem(larger, ratios[larger], reason, f"{larger}: {(1 - ratios[smaller]) / 2:g}"))
    pruning = PruningConfig(
        init_rank=init_rank,
        warmup_ratio=ratios["adaptive_warmup_ratio"],
        final_ratio=ratios["adaptive_final_ratio"],
        interval=common["adaptive_interval"],
        max_overhead=common["adaptive_max_overhead"],
        seed=seed,
    )
    return pruning, problems


def check_pruning_conflicts(flat: Mapping[str, Any], probes: bool) -> list[Problem]:
    """Upstream options that cannot go with pruning or, where the method ``probes``, with extra passes."""
    problems = _clashes([*PRUNING_CONFLICTS, *(PROBING_CONFLICTS if probes else ())], flat)
    if flat.get("adaptive_max_overhead") is not None and not probes:
        reason = "only igu_importance: integrated makes extra passes that could be thinned out"
        problems.append(Problem("adaptive_max_overhead", flat["adaptive_max_overhead"], reason, "leaving it out"))
    return problems


PRUNING_CONFLICTS = (
    Conflict(
        "deepspeed",
        lambda flat: (
            _deepspeed_stage(flat) == 1
            and _deepspeed_document(flat).get("data_types", {}).get("grad_accum_dtype") == "fp32"
        ),
        "DeepSpeed's bf16 optimizer (ZeRO-1 with grad_accum_dtype fp32) keeps gradients where scores cannot read them",
        "ZeRO-2, or leaving data_types out",
    ),
    Conflict(
        "adapter_name_or_path",
        lambda flat: bool(flat.get("adapter_name_or_path")) and not flat.get("create_new_adapter"),
        "pruning starts from a new, over-ranked adapter",
        "create_new_adapter: true",
    ),
    Conflict(
        "torch_compile",
        _on("torch_compile"),
        "masks and path positions change between steps, which would compile the model again and again",
        "torch_compile: false",
    ),
    Conflict(
        "auto_find_batch_size",
        _on("auto_find_batch_size"),
        "it restarts training in the middle with weights that were already trained",
        "auto_find_batch_size: false",
    ),
)
PROBING_CONFLICTS = (
    Conflict(
        "fp16",
        _on("fp16"),
        "extra passes are not loss-scaled, so their gradients would vanish",
        "bf16: true",
    ),
    Conflict(
        "stage",
        lambda flat: flat.get("stage", "sft") not in ("pt", "sft"),
        "extra passes need the loss that the model itself returns",
        "igu_importance: shrink",
    ),
    Conflict(
        "deepspeed",
        lambda flat: _deepspeed_stage(flat) == 3,
        "extra passes need whole weights on every process, which ZeRO-3 does not hold",
        "igu_importance: shrink",
    ),
    *(
        Conflict(key, _on(key), "extra passes use the model's own loss", "igu_importance: shrink")
        for key in ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "label_smoothing_factor")
    ),
)


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
