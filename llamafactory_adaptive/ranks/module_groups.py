"""Groups of modules: those that are ranked as one, and those that servers keep packed. Pure: no torch, no I/O."""

import re
from collections.abc import Sequence
from dataclasses import replace

from llamafactory_adaptive.ranks.allocation import Allocation, Bounds, allocate
from llamafactory_adaptive.ranks.module_names import module_type


# Modules of one parent that servers multiply in one go: attention, MLP, and the linear attention of hybrid models.
STACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PACKED = (*STACKED, ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))


def group_name(name: str, granularity: str) -> str:
    """Return the group of a module: its type, the layer up to its number, or the module itself.

    A module outside of all layers is a layer of its own, and layers of two towers are not the same.
    """
    if granularity == "type":
        return module_type(name)
    layer = re.match(r"(?:.*?\.)?\d+(?=\.)", name) if granularity == "layer" else None
    return layer.group() if layer else name


def pool_scores(scores: Sequence[float], costs: Sequence[int], groups: Sequence[str]) -> list[float]:
    """Replace every score by the mean of its group, weighted by what a rank of each module costs.

    Ideal ranks are proportional to scores, so that the share of the budget that a module gets is score times cost:
    with these weights a group keeps the share that its modules had alone, bounds aside.

    Args:
        scores: one non-negative number per module.
        costs: budget units that one rank of each module costs.
        groups: name of the group of each module.
    """
    totals: dict[str, tuple[float, int]] = {}
    for score, cost, group in zip(scores, costs, groups, strict=True):
        shares, units = totals.get(group, (0.0, 0))
        totals[group] = shares + score * cost, units + cost
    return [totals[group][0] / totals[group][1] for group in groups]


def packed_groups(names: Sequence[str]) -> list[list[int]]:
    """Find the modules that servers keep packed, as lists of their numbers; only groups of two and more."""
    kinds = {kind: group for group in PACKED for kind in group}
    members: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for index, name in enumerate(names):
        parent, _, kind = name.rpartition(".")
        if kind in kinds:
            members.setdefault((parent, kinds[kind]), []).append(index)
    return [group for group in members.values() if len(group) > 1]


def allocate_whole_groups(scores: Sequence[float], bounds: Bounds, packed: Sequence[Sequence[int]]) -> Allocation:
    """Distribute the budget over modules so that of packed modules either all have an adapter or none has.

    A server that packs q, k and v makes room for all three or refuses (SGLang) an adapter of some: a module left out
    saves nothing there. Those without a rank beside others with one get a lower bound of 1, and ranks are chosen
    anew; each round raises a bound, so that it ends, at the latest where all bounds are 1.

    Args:
        scores: as in :func:`allocate`.
        bounds: budget and bounds; a budget of at least one rank per module is enough for every round.
        packed: numbers of the modules of each group.
    """
    while True:
        allocation = allocate(scores, bounds)
        lacking = {index for group in half_adapted(allocation.ranks, packed) for index in group
                   if not allocation.ranks[index]}  # fmt: skip
        if not lacking:
            return allocation
        lower = [1 if i in lacking else low for i, low in enumerate(bounds.lower)]
        bounds = replace(bounds, lower=lower, upper=list(map(max, bounds.upper, lower)))


def half_adapted(ranks: Sequence[int], packed: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Find the groups of which some modules have an adapter and others have none."""
    return [group for group in packed if len({ranks[index] > 0 for index in group}) > 1]
