"""The Python API for users of PEFT, TRL and the plain Trainer. Nothing in it imports LLaMA-Factory.

Ranks found before training: :func:`calibration_batches`, :func:`score_modules`, :func:`plan_ranks`, then
:func:`attach_adapter` or :func:`lora_config`, and :func:`check_adapter` on what was saved. Ranks found while training:
:func:`rank_search`.
"""

from llamafactory_adaptive.api.adapters import attach_adapter, check_adapter, lora_config
from llamafactory_adaptive.api.plans import plan_ranks
from llamafactory_adaptive.api.scoring import calibration_batches, score_modules
from llamafactory_adaptive.api.search import rank_search


__all__ = [
    "attach_adapter",
    "calibration_batches",
    "check_adapter",
    "lora_config",
    "plan_ranks",
    "rank_search",
    "score_modules",
]
