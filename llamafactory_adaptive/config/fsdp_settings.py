"""FSDP's settings as a run is given them: by ``accelerate launch`` in the environment, or by the Trainer's keys."""

import os
from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.config.deepspeed_settings import read_settings
from llamafactory_adaptive.launcher import accelerate_starts


def fsdp_version(flat: Mapping[str, Any]) -> int:
    """Return the version of FSDP that a run trains under, 1 or 2; 0 without FSDP."""
    if not (flat.get("fsdp") or accelerate_starts("FSDP")):
        return 0
    asked = str(_setting(flat, "version", "1"))
    return int(asked) if asked.isdecimal() else 1


def saves_whole_adapters(flat: Mapping[str, Any]) -> bool:
    """Tell whether FSDP gathers what is saved; the Trainer saves no adapter at all where it does not."""
    default = "FULL_STATE_DICT" if fsdp_version(flat) == 1 else "SHARDED_STATE_DICT"  # accelerate's
    return os.environ.get("FSDP_STATE_DICT_TYPE", default).upper() == "FULL_STATE_DICT"


def loads_on_one_process(flat: Mapping[str, Any]) -> bool:
    """Tell whether the first process alone loads the base, to spread it."""
    return str(_setting(flat, "cpu_ram_efficient_loading", "false")).lower() == "true"


def _setting(flat: Mapping[str, Any], name: str, default: str) -> Any:
    """Read one setting where the run has it: from ``fsdp_config`` with the key ``fsdp``, else from the environment."""
    if not flat.get("fsdp"):
        return os.environ.get(f"FSDP_{name.upper()}", default)
    settings = read_settings(flat.get("fsdp_config"))
    return settings.get(name, settings.get(f"fsdp_{name}", default))
