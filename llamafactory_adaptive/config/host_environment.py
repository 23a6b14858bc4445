"""Checks of environment variables: hosts that cannot train adaptive ranks, and launchers. Standard library only."""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.errors import Problem


_SWITCHES = {
    "USE_MCA": "Megatron trains full parameters only",
    "USE_MEGATRON_BRIDGE": "Megatron-Bridge has a training loop of its own",
    "USE_V1": "v1 of LLaMA-Factory reads other settings and has a training loop of its own",
}
# A process's rank in its job, and the address at which the processes connect.
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_PANEL = ("lora_rank", "lora_alpha", "lora_target")


def _launcher_problems() -> list[Problem]:
    """Find a launcher's variables that are missing or wrong: a process would wait for others that never come."""
    here = {name: value for name in (*_NUMBERS, *_MEETING) if (value := os.environ.get(name)) is not None}
    problems = [
        Problem(name, here[name], "a launcher sets it to a whole number", f"unset {name}")
        for name in _NUMBERS
        if name in here and not _is_number(here[name], name)
    ]
    if problems:
        return problems
    rank, processes = (int(here.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank >= processes:
        reason = f"must be below WORLD_SIZE ({here.get('WORLD_SIZE', 'not set, so 1')})"
        return [Problem("RANK", here["RANK"], reason, "unset RANK, or starting the job with torchrun")]
    needed = {"RANK", "WORLD_SIZE", *_MEETING} if processes > 1 or int(here.get("LOCAL_RANK", "-1")) >= 0 else set()
    reason = "a process of a job needs all of " + ", ".join((*_NUMBERS, *_MEETING))
    return [
        Problem(name, None, reason, "torchrun or FORCE_TORCHRUN=1, which set them, or unsetting the others")
        for name in sorted(needed - set(here))
    ]


def _is_number(text: str, name: str) -> bool:
    least = {"LOCAL_RANK": -1, "RANK": 0, "WORLD_SIZE": 1}[name]  # older launchers set -1 for none
    try:
        return int(text) >= least
    except ValueError:
        return False


def _is_on(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "true", "y")


def _ray_problems(flat: Mapping[str, Any]) -> list[Problem]:
    """Find what does not go together with Ray, whose workers all take themselves for the first one of their node."""
    if importlib.util.find_spec("ray") is None:
        remedy = 'pip install "ray[default]", or USE_RAY=0'
        return [Problem("USE_RAY", os.environ["USE_RAY"], "Ray is not installed in this environment", remedy)]
    if flat.get("save_on_each_node"):
        reason = "every worker of Ray would write the same files at once"
        return [Problem("save_on_each_node", True, reason, "save_on_each_node: false, or torchrun")]
    return []


def check_environment(flat: Mapping[str, Any]) -> list[Problem]:
    """Find environment variables that ask for what this plugin cannot do, each with a way out."""
    problems = [
        Problem(name, os.environ[name], f"{reason}, so finetuning_type: adaptive does not run there", f"{name}=0")
        for name, reason in _SWITCHES.items()
        if _is_on(name)
    ]
    problems += _launcher_problems()
    if _is_on("USE_RAY"):
        problems += _ray_problems(flat)
    # LLaMA Board passes its LoRA panel on for ``finetuning_type: lora`` alone.
    lost = [key for key in _PANEL if flat.get(key) is None]
    if os.environ.get("LLAMABOARD_ENABLED") == "1" and lost:
        reason = "LLaMA Board does not pass its LoRA panel on for this finetuning type"
        example = 'Extra arguments: {"lora_rank": 8, "lora_alpha": 16, "lora_target": "all"} among the others'
        problems.append(Problem(", ".join(lost), None, reason, example))
    return problems
