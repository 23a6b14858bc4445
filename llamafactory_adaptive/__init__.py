"""Adaptive-rank (Q)LoRA fine-tuning: a plugin of LLaMA-Factory, and a Python API that does without it.

The names of ``__all__`` are imported from :mod:`llamafactory_adaptive.api` when they are first used. Nothing else may
be imported here: the start-up hook imports this module in every interpreter of the environment.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is too slow to import in every interpreter
    from llamafactory_adaptive.api import (
        attach_adapter,
        calibration_batches,
        check_adapter,
        lora_config,
        plan_ranks,
        rank_search,
        score_modules,
    )

__all__ = [
    "attach_adapter",
    "calibration_batches",
    "check_adapter",
    "lora_config",
    "plan_ranks",
    "rank_search",
    "score_modules",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llamafactory_adaptive import api

    value: object = getattr(api, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the module's names, with the public names that are not imported yet, for tab completion."""
    return sorted({*globals(), *__all__})
