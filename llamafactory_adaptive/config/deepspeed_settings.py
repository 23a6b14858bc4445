"""DeepSpeed's settings as a run is given them: a mapping, JSON, or the name of a file with it.

DeepSpeed itself is not needed: it reports what is wrong in its settings when it reads them.
"""

import json
import os
from pathlib import Path
from typing import Any

from llamafactory_adaptive.launcher import accelerate_starts


def is_inline(given: str) -> bool:
    """Tell whether settings are written as JSON and are not the name of a file that holds them."""
    return given.lstrip().startswith("{")


def read_settings(given: Any) -> dict[str, Any]:
    """Read settings given as a mapping, as JSON or as the name of a file; empty where none can be read."""
    try:
        if isinstance(given, (str, Path)):
            text = str(given)
            given = json.loads(text if is_inline(text) else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return given if isinstance(given, dict) else {}


def read_section(given: Any, name: str) -> dict[str, Any]:
    """Return the mapping ``name`` within the settings; an empty one where there is none."""
    settings = read_settings(given).get(name)
    return settings if isinstance(settings, dict) else {}


def settings_of_accelerate() -> Any:
    """Return the settings that ``accelerate launch`` passes in the environment; None where it starts no DeepSpeed."""
    if not accelerate_starts("DEEPSPEED"):
        return None
    if (file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        return file
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")  # as accelerate reads it
    return {"zero_optimization": {"stage": int(stage) if stage.isdecimal() else 0}}


def zero_optimization(given: Any) -> dict[str, Any]:
    """Return the settings of ZeRO, with their ``stage`` a whole number (0 where there is none)."""
    settings = read_section(given, "zero_optimization")
    stage = settings.get("stage", 0)
    return {**settings, "stage": stage if isinstance(stage, int) else 0}
