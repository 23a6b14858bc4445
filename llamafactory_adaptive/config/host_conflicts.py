"""Options of the host that cannot go with adaptive ranks, each with its reason and a way out.

Pure standard library, on the flat mapping of a run's settings.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.config.deepspeed_settings import (
    read_settings,
    settings_of_accelerate,
    zero_optimization,
)
from llamafactory_adaptive.config.fsdp_settings import fsdp_version, loads_on_one_process, saves_whole_adapters
from llamafactory_adaptive.errors import Problem


@dataclass(frozen=True)
class Conflict:
    """An upstream option that cannot go together with ``finetuning_type: adaptive``."""

    key: str
    clashes: Callable[[Mapping[str, Any]], bool]
    reason: str
    suggestion: str


def is_on(key: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return the rule that a key is set to something true."""
    return lambda flat: bool(flat.get(key))


def deepspeed_stage(flat: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a run; 0 without DeepSpeed."""
    return int(zero_optimization(flat.get("deepspeed"))["stage"])


CONFLICTS = (
    Conflict(
        "use_rslora",
        is_on("use_rslora"),
        "rsLoRA scales by sqrt(rank), so mixed ranks would be scaled unevenly",
        "use_rslora: false",
    ),
    Conflict("use_dora", is_on("use_dora"), "DoRA magnitudes are not served right at mixed ranks", "use_dora: false"),
    Conflict("pissa_init", is_on("pissa_init"), "PiSSA changes the base weights per rank", "pissa_init: false"),
    Conflict(
        "pissa_convert", is_on("pissa_convert"), "PiSSA changes the base weights per rank", "pissa_convert: false"
    ),
    Conflict("use_unsloth", is_on("use_unsloth"), "Unsloth takes one rank for all modules", "use_unsloth: false"),
    Conflict("use_kt", is_on("use_kt"), "KTransformers takes one rank for all modules", "use_kt: false"),
    Conflict(
        "use_hyper_parallel",
        is_on("use_hyper_parallel"),
        "HyperParallel trains full parameters only",
        "use_hyper_parallel: false",
    ),
    Conflict(
        "train_from_scratch",
        is_on("train_from_scratch"),
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
        "fsdp_state_dict_type",
        lambda flat: fsdp_version(flat) > 0 and not saves_whole_adapters(flat),
        "sharded checkpoints hold no adapter that could be served",
        "fsdp_state_dict_type: FULL_STATE_DICT in accelerate's configuration",
    ),
    Conflict(
        "fsdp_cpu_ram_efficient_loading",
        lambda flat: (
            fsdp_version(flat) == 2 and flat.get("quantization_bit") is not None and loads_on_one_process(flat)
        ),
        "accelerate cannot spread a quantised base that one process loads",
        "fsdp_cpu_ram_efficient_loading: false in accelerate's configuration",
    ),
    Conflict(
        "create_new_adapter",
        lambda flat: (
            bool(flat.get("create_new_adapter") and flat.get("adapter_name_or_path"))
            and (flat.get("quantization_bit") is not None or deepspeed_stage(flat) == 3)
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
    return find_clashes(CONFLICTS, flat)


def find_clashes(rules: Iterable[Conflict], flat: Mapping[str, Any]) -> list[Problem]:
    """Find the rules that a run's settings break."""
    if not flat.get("deepspeed"):
        flat = {**flat, "deepspeed": settings_of_accelerate()}
    return [
        Problem(rule.key, flat.get(rule.key), rule.reason, rule.suggestion) for rule in rules if rule.clashes(flat)
    ]


def check_sampling_conflicts(flat: Mapping[str, Any]) -> list[Problem]:
    """Find upstream options that cannot go with choosing samples by quality."""
    return find_clashes(SAMPLING_CONFLICTS, flat)


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
        is_on("streaming"),
        "every sample must be scored before training, and a stream has no known length",
        "streaming: false (or tsq_sampling: false)",
    ),
    Conflict(
        "disable_shuffling",
        is_on("disable_shuffling"),
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
        is_on("dataloader_drop_last"),
        "the samples of every step follow from its number, the last one of an epoch included",
        "dataloader_drop_last: false",
    ),
    Conflict(
        "ignore_data_skip",
        is_on("ignore_data_skip"),
        "a resumed run would see other samples than the log says",
        "ignore_data_skip: false",
    ),
    Conflict(
        "auto_find_batch_size",
        is_on("auto_find_batch_size"),
        "another batch size would be another order of samples",
        "auto_find_batch_size: false",
    ),
    Conflict("fp16", is_on("fp16"), "gradients of single samples are not loss-scaled and would vanish", "bf16: true"),
    Conflict(
        "deepspeed",
        lambda flat: deepspeed_stage(flat) == 3,
        "samples are scored with whole weights on every process, which ZeRO-3 does not hold",
        "ZeRO-2 (or tsq_sampling: false)",
    ),
    Conflict(
        "fsdp",
        lambda flat: fsdp_version(flat) > 0,
        "samples are scored with whole weights on every process, which FSDP does not hold",
        "deepspeed: examples/deepspeed/ds_z2_config.json (or tsq_sampling: false)",
    ),
)
