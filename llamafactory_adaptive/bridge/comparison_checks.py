"""Checks of a comparison's settings before anything runs: what cannot be compared, and each arm as its own run."""

import os
from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, our_keys, split_names
from llamafactory_adaptive.bridge.checked_run import checked_run
from llamafactory_adaptive.bridge.host_check import check_host_settings
from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.errors import AdaptiveConfigError, Problem, refuse, refuse_all
from llamafactory_adaptive.methods import make_method


_ROWS_OF = "adaptive_calibration_dataset"


def check_arm(arm: Arm, settings: Args, given: Args) -> None:
    """Check the settings of an arm's run as those of a run of its own.

    Args:
        arm: way to fine-tune.
        settings: those of a run.
        given: those of the YAML, which name the data sets of which rows are held out.

    Raises:
        AdaptiveConfigError: the run would be refused; the message names the arm.
    """
    try:
        refuse_all(*comparison_problems({**settings, "eval_dataset": given.get("eval_dataset")}))
        if settings["finetuning_type"] == "adaptive":
            checked_run({**settings, "output_dir": "x"}, host_too=False)
        elif stray := our_keys(settings):
            reason = "it has no effect on plain LoRA"
            refuse(stray[0], settings[stray[0]], reason, "adaptive_method=<a method> beside it")
        check_host_settings(settings)
    except AdaptiveConfigError as error:
        raise AdaptiveConfigError(
            [Problem(p.key, p.value, f"{p.allowed} (arm {arm.name})", p.suggestion) for p in error.problems]
        ) from error


def measured_before_training(settings: Args) -> str | None:
    """Return what a run measures before it trains, of modules, for a start from data and of samples; None for nothing.

    What is the same for two runs is measured once for each seed, and then kept.
    """
    if settings["finetuning_type"] != "adaptive":
        return None
    config = checked_run({**settings, "output_dir": "x"}, host_too=False).config
    method, own = make_method(config.method, config.options), f"{config.method} {dict(config.options)}"
    fixed_here = config.plan_path is None and config.search is None
    measured = []
    if fixed_here and (measurement := method.measurement()) is not None:
        measured.append(measurement.key)
    if config.init != "default":
        measured.append(f"{config.init} on {own}")
    if method.traits.samples:
        measured.append(f"samples of {own}")
    return ", ".join(measured) or None


def comparison_problems(given: Mapping[str, Any]) -> list[Problem]:
    """Find settings that a comparison cannot go with."""
    problems = []
    if given.get("stage", "sft") != "sft":
        reason = "a comparison is by the loss of held-out answers, which stage sft has"
        problems.append(Problem("stage", given.get("stage"), reason, "stage: sft"))
    if (kind := given.get("finetuning_type", "lora")) not in ("lora", "adaptive"):
        reason = "a comparison is of ways to train LoRA: must be lora or adaptive"
        problems.append(Problem("finetuning_type", kind, reason, "finetuning_type: lora"))
    for key in ("deepspeed", "fsdp"):
        if given.get(key):
            reason = "every run of a comparison has one process and one device"
            problems.append(Problem(key, given[key], reason, f"leaving {key} out, and quantization_bit: 4"))
    for key in ("packing", "neat_packing", "streaming"):
        if given.get(key):
            reason = "losses are compared row by row, and every arm trains on the same rows from the disk"
            problems.append(Problem(key, given[key], reason, f"{key}: false"))
    for key in ("tokenized_path", "adapter_name_or_path"):
        if given.get(key):
            problems.append(
                Problem(key, given[key], "a comparison starts from rows and the base", f"leaving {key} out")
            )
    return problems + _calibration_problems(given)


def warmup_problems(given: Mapping[str, Any], steps: int) -> list[Problem]:
    """Find a warm-up that is not over when the shortest runs end, whose rates then are not those that they try."""
    warmup = given.get("warmup_steps")
    if not isinstance(warmup, (int, float)) or warmup < max(1, steps):
        return []
    reason = f"the shortest runs of this comparison have {steps} steps, all of them in the warm-up"
    return [Problem("warmup_steps", warmup, reason, "warmup_ratio: 0.1 in its place")]


def _calibration_problems(given: Mapping[str, Any]) -> list[Problem]:
    """Find calibration sets that hold some of the data sets of which rows are held out."""
    named = set(split_names(given.get(_ROWS_OF)))
    held_from = set(split_names(given.get("dataset"))) | set(split_names(given.get("eval_dataset")))
    if not named & held_from or is_training_set(given):
        return []
    reason = "rows of it are held out to choose and to judge, and must not be scored on"
    return [
        Problem(_ROWS_OF, given[_ROWS_OF], reason, f"leaving {_ROWS_OF} out, or a data set that is not trained on")
    ]


def is_training_set(given: Mapping[str, Any]) -> bool:
    """Tell whether the calibration set is the whole training set, which a comparison scores without held-out rows."""
    named = split_names(given.get(_ROWS_OF))
    return bool(named) and set(named) == set(split_names(given.get("dataset")))


def without_training_set(settings: Args) -> Args:
    """Remove the calibration set where it is the training set: rows then come from what all arms train on."""
    return (
        {key: value for key, value in settings.items() if key != _ROWS_OF} if is_training_set(settings) else settings
    )


def visible_devices() -> list[str]:
    """List the devices that this process sees, as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(torch.cuda.device_count())]
    return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]


def gpu_kinds(given: Mapping[str, Any]) -> list[tuple[str, int]]:
    """List name and bytes of every GPU that this process sees; none where the settings keep to the CPU."""
    import torch

    if given.get("use_cpu"):
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [(each.name, each.total_memory) for each in properties]


def cpu_threads() -> int:
    """Count the threads of the CPU that a run would take."""
    import torch

    return torch.get_num_threads()
