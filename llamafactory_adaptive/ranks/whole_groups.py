"""Choices of rank-1 components under which packed modules all have an adapter or none has. Pure: no torch, no I/O.

A group begins with one component of each member, weighed as one by its worth per unit of the budget. Where that is
less than what comes after it in the group, both are weighed together, as the better part is not to be had without the
other. Components and beginnings are then taken by their worth per unit, the best first, as long as they fit.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamafactory_adaptive.ranks.allocation import Bounds, keep_components
from llamafactory_adaptive.ranks.module_groups import half_adapted


@dataclass(frozen=True)
class Step:
    """What is added at once: a component, or what a packed group begins with.

    Attributes:
        unit: number of the packed group, or of the module that is in none.
        position: place among the steps of its unit; nothing of the unit is added before the first.
        modules: numbers of the modules that get a component.
        worth: what it adds to what is kept, the sum over its components.
        cost: budget units.
    """

    unit: int
    position: int
    modules: tuple[int, ...]
    worth: float
    cost: int


def units_of(count: int, packed: Sequence[Sequence[int]]) -> list[list[int]]:
    """List the numbers of ``count`` modules by what has an adapter together: packed groups, and modules in none."""
    grouped = {index for group in packed for index in group}
    return sorted([*map(list, packed), *([index] for index in range(count) if index not in grouped)])


def steps_of(unit: int, members: Sequence[int], worths: Sequence[Sequence[float]], costs: Sequence[int]) -> list[Step]:
    """List what can be added to a unit, in order: what a group begins with, then its components, the best first.

    Args:
        unit: its number.
        members: numbers of its modules; a group must have a component of each.
        worths: per module, the worth of its components, the best first.
        costs: per module, what one of its components costs.
    """
    is_group = len(members) > 1
    steps: list[tuple[tuple[int, ...], float, int]] = [
        ((index,), worth, costs[index]) for index in members for worth in worths[index][is_group:]
    ]
    steps.sort(key=lambda step: -step[1] / step[2])
    if is_group:
        first = math.fsum(worths[index][0] for index in members), sum(costs[index] for index in members)
        steps.insert(0, (tuple(members), *first))
    return [Step(unit, position, *step) for position, step in enumerate(steps)]


def in_order(units: Sequence[Sequence[Step]]) -> list[list[Step]]:
    """List steps by worth per unit of the budget, those that a better one cannot be had without together with it."""
    joined: list[list[Step]] = []
    for steps in units:
        start = len(joined)
        for step in steps:
            joined.append([step])
            while len(joined) - start > 1 and _density(joined[-2]) < _density(joined[-1]):
                joined[-2:] = [[*joined[-2], *joined[-1]]]
    return sorted(joined, key=lambda steps: (-_density(steps), steps[0].unit))


def ranks_within(ordered: Sequence[Sequence[Step]], budget: int, lowest: Sequence[int]) -> list[int]:
    """Choose the ranks that are worth most per unit of the budget, of steps that fit into it.

    What is left of the budget is smaller than the cheapest step that could still be taken.

    Args:
        ordered: all steps, as :func:`in_order` lists them.
        budget: budget units for steps.
        lowest: per module, the rank that steps add to.
    """
    ranks, left, begun = list(lowest), budget, set[int]()
    openings = {steps[0].unit: -_density(steps[:1]) for steps in ordered if not steps[0].position}
    due = [(-_density(steps), steps[0].unit, steps[0].position, steps) for steps in ordered]
    while due:
        priority, unit, position, steps = heapq.heappop(due)
        if position and unit not in begun:
            if priority < openings[unit]:  # what it opens with is to be weighed by itself, and comes first
                heapq.heappush(due, (openings[unit], unit, position, steps))
        elif (cost := sum(step.cost for step in steps)) <= left:
            left -= cost
            begun.add(unit)
            for module in (module for step in steps for module in step.modules):
                ranks[module] += 1
        elif len(steps) > 1:  # together they do not fit; each by itself may
            for step in steps:
                heapq.heappush(due, (max(-_density([step]), openings[unit]), unit, step.position, [step]))
    return ranks


def keep_whole_groups(
    scores: Sequence[Sequence[float]], bounds: Bounds, packed: Sequence[Sequence[int]]
) -> list[list[bool]]:
    """Choose the rank-1 components to keep so that of packed modules either all keep some or none does.

    A component is worth its score times its cost. Where :func:`keep_components` leaves no group half adapted, and
    where a lowest rank is above 0, its choice stands.

    Args:
        scores: as in :func:`keep_components`.
        bounds: budget and bounds.
        packed: numbers of the modules of each group.

    Raises:
        InfeasibleBudgetError, ValueError: as :func:`keep_components`.
    """
    keep = keep_components(scores, bounds)
    if any(bounds.lower) or not half_adapted([sum(row) for row in keep], packed):
        return keep
    orders = [_best_first(row) for row in scores]
    worths = [
        [row[index] * cost for index in order[:high]]
        for row, order, cost, high in zip(scores, orders, bounds.costs, bounds.upper, strict=True)
    ]
    members = units_of(len(scores), packed)
    units = [steps_of(unit, each, worths, bounds.costs) for unit, each in enumerate(members)]
    ranks = ranks_within(in_order(units), bounds.budget, bounds.lower)
    kept = [set(order[:rank]) for order, rank in zip(orders, ranks, strict=True)]
    return [[index in chosen for index in range(len(row))] for row, chosen in zip(scores, kept, strict=True)]


def _best_first(row: Sequence[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda index: -row[index])


def _density(steps: Sequence[Step]) -> float:
    return math.fsum(step.worth for step in steps) / sum(step.cost for step in steps)
