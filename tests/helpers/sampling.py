"""Settings of sampling as a method gives them, with what a test leaves open filled in."""

from typing import Any

from llamafactory_adaptive.methods import Sampling


def sampling(**more: Any) -> Sampling:
    settings = {
        "weights": (1.0, 1.0, 0.0), "loss_drop": "first_order", "step_size": None, "projection": 0,
        "temperature": 1.0, "subset_ratio": 0.5, "clip_term": "loss", "clip_quantile": 1.0, "batch_size": None,
        "refresh_ratio": 0.25, "scales_budget": False, **more,
    }  # fmt: skip
    return Sampling(**settings)
