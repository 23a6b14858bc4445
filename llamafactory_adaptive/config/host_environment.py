"""Hosts of another kind, chosen by environment variables, that cannot train adaptive ranks. Standard library only."""

import os
from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.errors import Problem


_SWITCHES = {
    "USE_RAY": "every Ray worker takes itself for the first one, so each would score and plan for itself",
    "USE_MCA": "Megatron trains full parameters only",
}
_PANEL = ("lora_rank", "lora_alpha", "lora_target")


def check_environment(flat: Mapping[str, Any]) -> list[Problem]:
    """Find what the environment asks for and this plugin cannot do, with a way out."""
    problems = [
        Problem(name, os.environ[name], f"{reason}, so finetuning_type: adaptive does not run there", f"{name}=0")
        for name, reason in _SWITCHES.items()
        if os.environ.get(name, "0").lower() in ("1", "true", "y")
    ]
    # LLaMA Board passes its LoRA panel on for ``finetuning_type: lora`` alone.
    lost = [key for key in _PANEL if flat.get(key) is None]
    if os.environ.get("LLAMABOARD_ENABLED") == "1" and lost:
        reason = "LLaMA Board does not pass its LoRA panel on for this finetuning type"
        example = 'Extra arguments: {"lora_rank": 8, "lora_alpha": 16, "lora_target": "all"} among the others'
        problems.append(Problem(", ".join(lost), None, reason, example))
    return problems
