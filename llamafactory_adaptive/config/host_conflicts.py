"""Options of the host that cannot go with adaptive ranks, each with its reason and a way out.

Pure standard library, on the flat mapping of a run's settings.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.config.deepspeed_settings import (
    read_section,
    read_settings,
    settings_of_accelerate,
    zero_optimization,
)
from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.launcher import accelerate_starts
from llamafactory_adaptive.ranks.schedule import Strategy


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
    """Return the ZeRO stage of a run; 0 without DeepSpeed."""
    return int(zero_optimization(flat.get("deepspeed"))["stage"])


CONFLICTS = (
    Conflict(
        "use_rslora",
        _on("use_rslora"),
        "rsLoRA scales by sqrt(rank), so mixed ranks would be scaled unevenly",
        "use_rslora: false",
    ),
    Conflict("use_dora", _on("use_dora"), "DoRA magnitudes are not served right at mixed ranks", "use_dora: false"),
    Conflict("pissa_init", _on("pissa_init"), "PiSSA changes the base weights per rank", "pissa_init: false"),
    Conflict("pissa_convert", _on("pissa_convert"), "PiSSA changes the base weights per rank", "pissa_convert: false"),
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
        lambda flat: bool(flat.get("fsdp")) or accelerate_starts("FSDP"),
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
    """Find upstream options that cannot go with an adaptive run."""
    return _clashes(CONFLICTS, flat)


def _clashes(rules: Iterable[Conflict], flat: Mapping[str, Any]) -> list[Problem]:
    if not flat.get("deepspeed"):
        flat = {**flat, "deepspeed": settings_of_accelerate()}
    return [
        Problem(rule.key, flat.get(rule.key), rule.reason, rule.suggestion) for rule in rules if rule.clashes(flat)
    ]


def check_search_conflicts(flat: Mapping[str, Any], strategy: Strategy, probes: bool) -> list[Problem]:
    """Find upstream options that cannot go with changing ranks or, where the method ``probes``, with extra passes."""
    rules = [*MASKING_CONFLICTS, *(REALLOCATION_CONFLICTS if strategy == "reallocate" else ())]
    problems = _clashes([*rules, *(PROBING_CONFLICTS if probes else ())], flat)
    if flat.get("adaptive_max_overhead") is not None and not probes:
        reason = "only igu_importance: integrated makes extra passes that could be thinned out"
        problems.append(Problem("adaptive_max_overhead", flat["adaptive_max_overhead"], reason, "leaving it out"))
    return problems


def check_sampling_conflicts(flat: Mapping[str, Any]) -> list[Problem]:
    """Find upstream options that cannot go with choosing samples by quality."""
    return _clashes(SAMPLING_CONFLICTS, flat)


MASKING_CONFLICTS = (
    Conflict(
        "deepspeed",
        lambda flat: (
            _deepspeed_stage(flat) == 1
            and read_section(flat.get("deepspeed"), "data_types").get("grad_accum_dtype") == "fp32"
        ),
        "DeepSpeed's bf16 optimizer (ZeRO-1 with grad_accum_dtype fp32) keeps gradients where scores cannot read them",
        "ZeRO-2, or leaving data_types out",
    ),
    Conflict(
        "adapter_name_or_path",
        lambda flat: bool(flat.get("adapter_name_or_path")) and not flat.get("create_new_adapter"),
        "ranks are found on a new adapter, whose live tensors are larger than the old one's",
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
# Optimizers whose states are one number per weight, so that those of a component that comes back can be set anew.
# Not rmsprop_bnb: its squares lie where those of its siblings keep momenta.
_ELEMENTWISE_OPTIMIZERS = {
    "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "sgd", "adagrad", "rmsprop",
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw", "paged_adamw_32bit",
    "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
}  # fmt: skip
_OWN_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
REALLOCATION_CONFLICTS = (
    Conflict(
        "optim",
        lambda flat: str(flat.get("optim") or "adamw_torch") not in _ELEMENTWISE_OPTIMIZERS,
        "components that come back need fresh optimizer states, and where this one keeps them per weight is not known",
        "optim: adamw_torch",
    ),
    *(
        Conflict(key, _on(key), "components that come back need empty states in a plain optimizer", f"{key}: false")
        for key in _OWN_OPTIMIZERS
    ),
    Conflict(
        "deepspeed",
        lambda flat: bool(flat.get("deepspeed")) and _deepspeed_stage(flat) == 0,
        "without ZeRO DeepSpeed keeps optimizer states where they cannot be cleared",
        "ZeRO-1, 2 or 3, or leaving deepspeed out",
    ),
)


def _regroups(flat: Mapping[str, Any]) -> bool:
    """Tell whether accelerate is configured to batch otherwise than by default."""
    settings = read_settings(flat.get("accelerator_config"))
    return bool(settings.get("split_batches") or settings.get("even_batches") is False)


SAMPLING_CONFLICTS = (
    Conflict(
        "accelerator_config",
        _regroups,
        "the samples of every step follow from its number, by the default batching alone",
        "leaving split_batches and even_batches out",
    ),
    Conflict(
        "stage",
        lambda flat: flat.get("stage", "sft") not in ("pt", "sft"),
        "the quality of a sample is measured with the next-token loss of one text",
        "tsq_sampling: false",
    ),
    Conflict(
        "packing",
        lambda flat: flat.get("stage", "sft") == "sft" and bool(flat.get("packing") or flat.get("neat_packing")),
        "a packed row holds several samples, whose qualities would be mixed",
        "packing: false (or tsq_sampling: false)",
    ),
    Conflict(
        "streaming",
        _on("streaming"),
        "every sample must be scored before training, and a stream has no known length",
        "streaming: false (or tsq_sampling: false)",
    ),
    Conflict(
        "disable_shuffling",
        _on("disable_shuffling"),
        "samples come in the order in which they are drawn",
        "disable_shuffling: false",
    ),
    Conflict(
        "train_sampling_strategy",
        lambda flat: flat.get("train_sampling_strategy") not in (None, "random"),
        "samples come in the order in which they are drawn",
        "train_sampling_strategy: random",
    ),
    Conflict(
        "dataloader_drop_last",
        _on("dataloader_drop_last"),
        "the samples of every step follow from its number, the last one of an epoch included",
        "dataloader_drop_last: false",
    ),
    Conflict(
        "ignore_data_skip",
        _on("ignore_data_skip"),
        "a resumed run would see other samples than the log says",
        "ignore_data_skip: false",
    ),
    Conflict(
        "auto_find_batch_size",
        _on("auto_find_batch_size"),
        "another batch size would be another order of samples",
        "auto_find_batch_size: false",
    ),
    Conflict("fp16", _on("fp16"), "gradients of single samples are not loss-scaled and would vanish", "bf16: true"),
    Conflict(
        "deepspeed",
        lambda flat: _deepspeed_stage(flat) == 3,
        "samples are scored with whole weights on every process, which ZeRO-3 does not hold",
        "ZeRO-2 (or tsq_sampling: false)",
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
