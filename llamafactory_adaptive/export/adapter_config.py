"""Reading of ``adapter_config.json``: every value is checked, and what a plain LoRA layout cannot express is refused.

Adapters are shared by people who do not know each other, so no value in the file is trusted.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llamafactory_adaptive.errors import Problem, refuse, refuse_all
from llamafactory_adaptive.export.faults import read_untrusted, refuse_entries_outside
from llamafactory_adaptive.files import STATE_JSON
from llamafactory_adaptive.ranks.module_names import is_module_name, is_plain_key


# What LLaMA-Factory's reward stage writes beside an adapter.
VALUE_HEADS = ("value_head.safetensors", "value_head.bin")
# Starts that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ subtract from it when PEFT loads them.
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
NARROWED = ("exclude_modules", "layers_to_transform", "layers_pattern")  # keys that leave out some named targets
LARGEST_RANK, LARGEST_ALPHA = 65_536, 1e9

# Keys that change what the tensors mean, and why no layout can carry them.
_REFUSED: dict[str, str] = {
    "use_dora": "DoRA normalises whole columns, which no LoRA layout can say",
    "lora_bias": "biases of LoRA layers have no place in these layouts",
    "use_qalora": "QALoRA pools its inputs",
    "fan_in_fan_out": "the base stores its weights transposed (Conv1D)",
    "trainable_token_indices": "trained tokens are no LoRA",
    "target_parameters": "adapters on bare parameters (fused experts) have no module of their own",
    "layer_replication": "the adapter is for a model with repeated layers",
    "alora_invocation_tokens": "activated LoRA starts in the middle of a text",
    "megatron_config": "it belongs to Megatron's parallel layers",
    "arrow_config": "routing between adapters is no single adapter",
}
# The same, of variants that PEFT has only since its version 0.19 or later: an older one loads such an adapter as plain
# LoRA, with no more than a warning.
_REFUSED_SINCE: dict[str, str] = {
    "use_bdlora": "BD-LoRA's factors are blocks of a diagonal",
    "kasa_config": "KaSA cuts the base's weights, and has a diagonal between its factors",
}
# PEFT names the switches of its variants so; these leave the meaning of A and B as it is, or are seen to elsewhere.
_SWITCH = re.compile(r"use_\w+|\w+_config")
_KNOWN_SWITCHES = (*_REFUSED, *_REFUSED_SINCE, "use_rslora", "eva_config", "corda_config", "loftq_config",
                   "lora_ga_config", "velora_config", "runtime_config")  # fmt: skip
ELSEWHERE = "`llamafactory-cli export`, which merges through PEFT"
_AGAIN = "saving the adapter again"
_BY_ITS_PEFT = "plain LoRA, or merging it with the version of PEFT that it was trained with"


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of an adapter and check each value that PEFT or the export uses.

    Raises:
        AdaptiveConfigError: the adapter cannot be exported; the message gives all reasons at once.
    """
    for name, allowed, suggestion in (
        (ADAPTER_CONFIG, "there is no adapter in it", "the output_dir of a finished run"),
        (ADAPTER_WEIGHTS, "it has no weights as safetensors (pickled ones are not opened)", "saving it again"),
    ):
        if not (folder / name).is_file():
            refuse("adapter", str(folder), f"{name} is missing: {allowed}", suggestion)
    refuse_entries_outside(folder, "adapter")
    config = read_untrusted(folder, ADAPTER_CONFIG, "adapter")
    refuse_all(*_problems(folder, config))
    return config


def _problems(folder: Path, config: Mapping[str, Any]) -> list[Problem]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [Problem("peft_type", _short(kind), "only LORA adapters can be laid out for servers", ELSEWHERE)]
    problems = [
        Problem(key, _short(config[key]), why, "plain LoRA, or " + ELSEWHERE)
        for key, why in _REFUSED.items()
        if config.get(key)
    ]
    unknown = [key for key in config if _SWITCH.fullmatch(key) and key not in _KNOWN_SWITCHES]
    why = "a variant of LoRA that is not known here, and may change what the tensors mean"
    newer = {**dict.fromkeys(unknown, why), **_REFUSED_SINCE}.items()
    problems += [Problem(key, _short(config[key]), said, _BY_ITS_PEFT) for key, said in newer if config.get(key)]
    problems += [*_number_problems(config), *_name_problems(config), *_init_problems(config)]
    if (folder / STATE_JSON).is_file():
        why = "it is a checkpoint of an unfinished run"
        problems.append(Problem("adapter", str(folder), why, "the output_dir of the finished run"))
    if heads := [name for name in VALUE_HEADS if (folder / name).is_file()]:
        problems.append(Problem("adapter", heads[0], "the value head of a reward model would be lost", ELSEWHERE))
    return problems


def _init_problems(config: Mapping[str, Any]) -> list[Problem]:
    """List problems with biases, with initial factors that change the base, and with ``use_rslora``."""
    problems = []
    if config.get("bias", "none") not in ("none", None):
        problems.append(
            Problem("bias", _short(config["bias"]), "trained biases have no place in these layouts", ELSEWHERE)
        )
    if config.get("init_lora_weights") not in HARMLESS_INITS:
        why = "PEFT changes the base weights when it loads such an adapter, servers do not"
        try_it = "PEFT's path_initial_model_for_weight_conversion when saving"
        problems.append(Problem("init_lora_weights", _short(config["init_lora_weights"]), why, try_it))
    if not isinstance(config.get("use_rslora", False), (bool, type(None))):
        problems.append(Problem("use_rslora", _short(config["use_rslora"]), "it is true or false", _AGAIN))
    return problems


def _number_problems(config: Mapping[str, Any]) -> list[Problem]:
    """List problems with numbers: ranks are whole, from 1 on, alphas positive; patterns map module names to them."""
    problems = []
    allowed = f"ranks are whole numbers from 1 on, alphas positive numbers, up to {LARGEST_RANK} and {LARGEST_ALPHA:g}"
    for key, pattern, fits in (("r", "rank_pattern", _is_rank), ("lora_alpha", "alpha_pattern", _is_alpha)):
        values = config.get(pattern) or {}
        if not isinstance(values, dict):
            problems.append(Problem(pattern, _short(values), "it maps module names to numbers", _AGAIN))
            continue
        wrong = {name: value for name, value in {**values, key: config.get(key)}.items() if not fits(value)}
        problems += [Problem(name, _short(value), allowed, _AGAIN) for name, value in wrong.items()][:3]
        why = "a key must be the name of a module; expressions are not evaluated, one could run for ever"
        keys = [name for name in values if not is_plain_key(name)]
        problems += [Problem(pattern, _short(name), why, "the names of the modules in full") for name in keys[:3]]
    return problems


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def _is_alpha(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= LARGEST_ALPHA and math.isfinite(value)  # type: ignore[operator, arg-type]


def _name_problems(config: Mapping[str, Any]) -> list[Problem]:
    """List problems with names: of the base, of the task, of fully trained modules and of target modules."""
    problems = []
    base, task = config.get("base_model_name_or_path"), config.get("task_type")
    if not isinstance(base, (str, type(None))) or (base and ("\0" in base or len(base) > 4096)):
        why = "must be the name of a model"
        problems.append(Problem("base_model_name_or_path", _short(base), why, "--base MODEL and a corrected config"))
    if task not in ("CAUSAL_LM", None):
        why = "only adapters of causal language models (CAUSAL_LM) can be laid out"
        problems.append(Problem("task_type", _short(task), why, ELSEWHERE))
    saved, targets = config.get("modules_to_save"), config.get("target_modules")
    if saved is not None and not (isinstance(saved, list) and all(map(is_module_name, saved))):
        problems.append(Problem("modules_to_save", _short(saved), "must be a list of module names", _AGAIN))
    # A text is an expression over names; it is not needed, since the file has a tensor for each of its modules.
    if not isinstance(targets, (str, type(None))) and not (
        isinstance(targets, list) and all(map(is_module_name, targets))
    ):
        problems.append(Problem("target_modules", _short(targets), "must be a list of module names", _AGAIN))
    return problems


def _short(value: Any) -> Any:
    """Return a value for an error message: itself, or the beginning of its text if that is long."""
    return value if len(shown := repr(value)) <= 200 else f"{shown[:200]}..."
