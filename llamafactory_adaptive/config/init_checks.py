"""Checks of ``adaptive_init``: what a start computed from data cannot go with. Standard library only."""

from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.config.host_conflicts import Conflict, deepspeed_stage, find_clashes
from llamafactory_adaptive.errors import Problem


_INIT, _GAMMA = "adaptive_init", "adaptive_init_gamma"


def check_init(flat: Mapping[str, Any], common: Mapping[str, Any], method: str, own_start: bool) -> list[Problem]:
    """Find what speaks against the start that a run asks for.

    Args:
        flat: the run's settings.
        common: the keys that hold for every method, defaults filled in.
        method: the method's name.
        own_start: whether the method starts its factors by itself, in a search or as triplets on given ranks.
    """
    problems = []
    if flat.get(_GAMMA) is not None and common[_INIT] != "gora":
        reason = f"it is read with {_INIT}: gora alone"
        problems.append(Problem(_GAMMA, flat[_GAMMA], reason, f"leaving it out, or {_INIT}: gora"))
    if common[_INIT] == "default":
        return problems
    if own_start:
        reason = f"adaptive_method: {method} starts the factors that it trains by itself"
        problems.append(Problem(_INIT, common[_INIT], reason, f"{_INIT}: default, or adaptive_method: sensitivity"))
    return problems + find_clashes(_CONFLICTS, flat)


_CONFLICTS = (
    Conflict(
        _INIT,
        lambda flat: deepspeed_stage(flat) == 3,
        "under ZeRO-3 no process holds a whole factor that could be set before training",
        f"ZeRO-2, or {_INIT}: default",
    ),
    Conflict(
        _INIT,
        lambda flat: bool(flat.get("adapter_name_or_path")) and not flat.get("create_new_adapter"),
        "the adapter of adapter_name_or_path is gone on with, and its factors are trained already",
        f"create_new_adapter: true, or {_INIT}: default",
    ),
)
