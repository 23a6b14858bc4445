"""LLaMA-Factory's v1 (``USE_V1=1``, experimental there): a plan as its PEFT plugin, and a refusal of all else.

v1 reads other settings and has a training loop of its own, which offers no place between the backward pass and the
optimizer: ranks can be trained that are fixed before, by ``peft_config: {name: adaptive, plan: FILE}``.
"""

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, cast

from torch import nn

from llamafactory_adaptive.errors import AdaptiveConfigError, Problem, refuse_all
from llamafactory_adaptive.reports.plaintext import tell


_KEYS = ("name", "plan", "lora_dropout", "adapter_name_or_path")


def register(plugin: Any) -> Any:
    """Register ``name: adaptive`` at v1's PEFT plugins, and return the class of plugins as it was."""
    plugin("adaptive").register()(attach_planned)
    return plugin


def attach_planned(model: nn.Module, peft_config: Mapping[str, Any], is_train: bool = False) -> nn.Module:
    """Attach the LoRA adapter of a plan to a model that is trained, or load one that has been.

    Args:
        model: base model.
        peft_config: ``plan``, the path of a saved plan, and perhaps ``lora_dropout``; or ``adapter_name_or_path``.
        is_train: whether the model is trained.

    Raises:
        AdaptiveConfigError: a key is unknown, or ``plan`` is missing.
        AdaptiveError: the plan cannot be read, or does not fit the model.
    """
    from llamafactory.v1.plugins.model_plugins import peft as host

    from llamafactory_adaptive.api.adapters import attach_adapter

    trained, plan = peft_config.get("adapter_name_or_path"), peft_config.get("plan")
    unknown = [key for key in peft_config if key not in _KEYS]
    problems = [Problem(key, peft_config[key], f"must be one of {', '.join(_KEYS)}", "leaving it out")
                for key in unknown]  # fmt: skip
    if not trained and not (isinstance(plan, str) and Path(plan).is_file()):
        remedy = "writing one with `llamafactory-adaptive plan X.yaml`, without USE_V1"
        problems.append(Problem("plan", plan, "must be the file of a plan", remedy))
    refuse_all(*problems)
    if trained:
        return cast(nn.Module, host.load_adapter(model, trained, is_train))
    dropout = float(peft_config.get("lora_dropout", 0.05))
    return cast(nn.Module, attach_adapter(model, str(plan), lora_dropout=dropout))


def refusing_launch(original: Callable[[], None]) -> Callable[[], None]:
    """Wrap v1's launcher, so that settings with ``finetuning_type: adaptive`` end in one message and exit code 2."""

    @wraps(original)
    def launch() -> None:
        if len(sys.argv) > 2 and _asks_for_adaptive(sys.argv[2:]):
            reason = "v1 of LLaMA-Factory has no finetuning_type, and trains ranks that are fixed before alone"
            problem = Problem("USE_V1", "1", reason, "USE_V1=0, or peft_config: {name: adaptive, plan: FILE}")
            tell(f"error: {AdaptiveConfigError([problem])}")
            raise SystemExit(2)
        original()

    return launch


def _asks_for_adaptive(words: list[str]) -> bool:
    import yaml

    if "finetuning_type=adaptive" in words:
        return True
    try:
        settings = yaml.safe_load(Path(words[0]).read_text(encoding="utf-8")) if Path(words[0]).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return False  # the host says what is wrong with it
    return isinstance(settings, dict) and settings.get("finetuning_type") == "adaptive"
