"""Hooks that run in a training step when gradients are complete and not yet clipped."""

from collections.abc import Callable
from functools import wraps
from typing import Any


def before_clipping(accelerator: Any, hook: Callable[[], None]) -> None:
    """Call ``hook`` once gradients are complete and not yet clipped, once per optimizer step, without DeepSpeed.

    The Trainer has its accelerator compute the gradient norm at every step, whether it clips or not; its callbacks
    only run after that.
    """
    _call_before(accelerator, "clip_grad_norm_", hook)


def before_deepspeed_step(engine: Any, hook: Callable[[], None]) -> None:
    """Call ``hook`` between ``engine.backward`` and ``engine.step``.

    accelerate calls both inside ``backward``, so that the Trainer's callbacks run too late; it calls ``step`` only at
    accumulation boundaries.
    """
    _call_before(engine, "step", hook)


def _call_before(owner: Any, name: str, hook: Callable[[], None]) -> None:
    """Make one object call ``hook`` before every call of its method ``name``."""
    original = getattr(owner, name)

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        hook()
        return original(*args, **kwargs)

    setattr(owner, name, method)
