"""Advice on the learning rate of a method whose adapter starts slower than plain LoRA's."""

import math


TRAINERS_RATE = 5e-5  # transformers' default
_MOST = 10.0  # a larger factor is not advised: the first steps would move elements of P and Q by their own size
_USUAL = 1e-4  # where plain LoRA is trained, at least


def rate_advice(rate: float, slowdown: float, optimizer: str, one_rate: bool) -> tuple[str | None, str | None]:
    """Return a description of the learning rate and a warning, where there is something to say.

    Args:
        rate: learning rate of the run.
        slowdown: how many times smaller the first update of a component is than plain LoRA's at the same rate.
        optimizer: the Trainer's name of it. The figures are AdamW's: nothing is said of others.
        one_rate: whether all factors have this rate; nothing is said otherwise (LoRA+).
    """
    if "adam" not in optimizer or not one_rate:
        return None, None
    return rate_words(rate, slowdown), rate_warning(rate, slowdown)


def rate_words(rate: float, slowdown: float) -> str | None:
    """Describe a learning rate by that of plain LoRA with an equal first update; None where it is the same.

    Args:
        rate: learning rate of the run.
        slowdown: how many times smaller the first update of a component is than plain LoRA's at the same rate.
    """
    if rate <= 0.0 or math.isclose(slowdown, 1.0, rel_tol=0.05):
        return None
    return (
        f"learning_rate {rate:g} moves each component of Delta W at first as plain LoRA does at "
        f"{rate / slowdown:.2g}; the first update of plain LoRA at {rate:g} takes learning_rate {rate * slowdown:.2g}"
    )


def rate_warning(rate: float, slowdown: float) -> str | None:
    """Return a warning if the rate is one of plain LoRA and the first update is an order of magnitude smaller.

    No warning comes at or above the rate that it advises.
    """
    factor = min(slowdown, _MOST)
    if slowdown < math.sqrt(10.0) or not 0.0 < rate < _USUAL * factor:
        return None
    return (
        f"learning_rate {rate:g} is low for this method: each component of Delta W moves at first {slowdown:.0f} "
        f"times less than plain LoRA's; try learning_rate: {_rounded_up(_USUAL * factor):g}"
    )


def _rounded_up(value: float) -> float:
    """Round up to one significant digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(round(value / unit, 9)) * unit
