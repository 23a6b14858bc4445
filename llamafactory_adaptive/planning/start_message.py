"""The line that tells the user what a run is about to do before it trains."""

from pathlib import Path

from llamafactory_adaptive.calibration.measurement import needs_rows
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.ranks.search_config import PruningConfig


def start_message(config: AdaptiveConfig, adapter: Path | None = None) -> str:
    """Describe where ranks and the start of the factors will come from, and about how long that takes.

    Args:
        config: the configuration of the run.
        adapter: the trained adapter that the run goes on with, if any.
    """
    if adapter is not None:
        return f"training goes on with the adapter {adapter} and its ranks; nothing is scored"
    return _of_the_ranks(config) + _of_the_start(config)


def _of_the_start(config: AdaptiveConfig) -> str:
    """Describe what the factors start from; empty where they start as PEFT starts them."""
    if config.init == "default":
        return ""
    passes = "forward passes" if config.init == "eva" else "a backward pass"
    return (
        f"; what the factors start from (adaptive_init: {config.init}) is computed before training, by loading the "
        f"model and {passes} over {config.calibration.samples} rows, unless it was for the same request"
    )


def _of_the_ranks(config: AdaptiveConfig) -> str:
    if config.plan_path:
        form = "" if config.given is None else f" and train as P diag(lambda) Q, the second stage of {config.method}"
        return f"the ranks are those of {config.plan_path}{form}; nothing is scored"
    if config.search is not None:
        live, prunes = config.search.live_rank, isinstance(config.search, PruningConfig)
        course = f"from rank {live} to" if prunes else f"at most rank {live} a module, at"
        return (
            f"{config.method} finds the ranks while it trains, {course} the cost of uniform rank {config.lora_rank}; "
            f"nothing is scored before{_scale_words(config)}"
        )
    measurement = make_method(config.method, config.options).measurement()
    if measurement is None:
        return f"{config.method} gives out the ranks at once; nothing is scored"
    if not needs_rows(measurement):
        return (
            f"{config.method} scores the modules by the base weights alone before training, without any rows, which "
            "takes little longer than loading the model; scores of the same request are re-used"
        )
    return (
        f"{config.method} scores the modules on {config.calibration.samples} rows before training, which takes about "
        "as long as loading the model and passing over the rows; scores of the same request are re-used"
    )


def _scale_words(config: AdaptiveConfig) -> str:
    """Describe the scale, where ``lora_alpha`` is divided by the rank at the start; empty elsewhere."""
    if config.asked_alpha is None:
        return ""
    return (
        f"; lora_alpha {config.asked_alpha:g} is divided by the rank it starts from, which is as strong as lora_alpha "
        f"{config.lora_alpha:g} over lora_rank {config.lora_rank}"
    )
