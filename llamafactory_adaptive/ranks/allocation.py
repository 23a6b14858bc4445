"""Allocation of integer ranks from scores, costs and a budget. Pure: no torch, no I/O.

Static methods score modules: ranks are proportional to the scores within their bounds (water-filling: what a capped
module cannot take goes to the rest by the same proportions), then rounded down and completed by the largest
remainders. Dynamic methods score rank-1 components: the globally best are kept, or modules share the budget by their
sensitivities. Results are deterministic: ties go to the earlier module.
"""

import bisect
import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llamafactory_adaptive.errors import InfeasibleBudgetError


_LEAST_SCORE = 1e-250  # of the largest: below it a score is 0, so that bound / score stays finite


@dataclass(frozen=True)
class Bounds:
    """Budget, and the limits on every module's rank.

    Attributes:
        costs: budget units one rank of each module costs (``d_in + d_out`` parameters, or 1).
        budget: units available in total.
        lower, upper: smallest and largest rank of each module.
    """

    costs: Sequence[int]
    budget: int
    lower: Sequence[int]
    upper: Sequence[int]

    def cost(self, ranks: Iterable[float]) -> float:
        """Compute what ranks cost in total; a whole number for whole ranks."""
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True))

    def select(self, modules: Sequence[int]) -> "Bounds":
        """Select the bounds of some modules, given by number; the budget stays the same."""
        costs, lower, upper = ([each[i] for i in modules] for each in (self.costs, self.lower, self.upper))
        return Bounds(costs, self.budget, lower, upper)


@dataclass(frozen=True)
class Allocation:
    """Ranks that :func:`allocate` chose.

    Attributes:
        ranks: integer rank per module.
        ideal: real-valued water-filled rank per module, before rounding.
        spent: budget units used, ``sum(rank * cost)``.
        budget: budget units asked for.
    """

    ranks: tuple[int, ...]
    ideal: tuple[float, ...]
    spent: int
    budget: int


def allocate(scores: Sequence[float], bounds: Bounds) -> Allocation:
    """Distribute the budget over modules in proportion to their scores.

    Args:
        scores: non-negative finite importance per module; a module's ideal rank is proportional to it.
        bounds: budget, and the smallest and largest ranks.

    Returns:
        Ranks that never cost more than the budget; what is left is smaller than the cheapest unit that could still
        be added within the bounds.

    Raises:
        InfeasibleBudgetError: the bounds alone cost more than the budget, or cannot use it up.
        ValueError: a score is negative, infinite or NaN.
    """
    _check(scores, bounds)
    ideal = water_fill(scores, bounds, bounds.budget)
    # A share that lands on an integer up to rounding error is that integer.
    ranks = [max(low, math.floor(value + 1e-9)) for value, low in zip(ideal, bounds.lower, strict=True)]
    left = _complete(ranks, ideal, bounds)
    return Allocation(tuple(ranks), tuple(ideal), bounds.budget - left, bounds.budget)


def _check(scores: Sequence[float], bounds: Bounds) -> None:
    for index, score in enumerate(scores):
        if not (math.isfinite(score) and score >= 0):
            raise ValueError(f"score of module {index} is {score}; scores must be finite and not negative")
    least, most, budget = bounds.cost(bounds.lower), bounds.cost(bounds.upper), bounds.budget
    if least > budget:
        raise InfeasibleBudgetError(
            f"the lowest ranks alone cost {least:,}, the budget is {budget:,}; lower adaptive_min_rank or "
            "raise lora_rank"
        )
    if most < budget:
        raise InfeasibleBudgetError(
            f"the highest ranks together cost {most:,}, the budget is {budget:,}; raise adaptive_max_rank or lower "
            "lora_rank (no rank exceeds the smaller side of its module)"
        )


def water_fill(scores: Sequence[float], bounds: Bounds, budget: float) -> list[float]:
    """Find real-valued ranks ``clip(level * score, lower, upper)`` whose cost is exactly ``budget``.

    The cost is piecewise linear in ``level``: each module joins the slope at ``lower/score`` and leaves it at
    ``upper/score``. A search over the sorted break points finds the piece, and the piece gives the level. Costs are
    summed exactly at each look: a running sum would lose scores many orders of magnitude below the largest.

    Modules with score 0 stay at their lower bound unless all others are capped; what is then left is shared among
    them equally.
    """
    top = max(scores, default=0.0)
    if top <= 0.0:
        return _fill_equally(bounds, budget)
    scaled = [score / top if score / top > _LEAST_SCORE else 0.0 for score in scores]
    modules = list(zip(scaled, bounds.costs, bounds.lower, bounds.upper, strict=True))

    def ranks_at(level: float) -> list[float]:
        return [min(max(level * score, float(low)), float(high)) for score, _, low, high in modules]

    def cost_at(level: float) -> float:
        return math.fsum(rank * unit for rank, unit in zip(ranks_at(level), bounds.costs, strict=True))

    points = sorted({bound / score for score, _, low, high in modules if score for bound in (low, high)})
    index = bisect.bisect_right(points, budget, key=cost_at)
    level = points[max(0, index - 1)]
    slopes = [
        unit * score if score and low / score <= level < high / score else 0.0 for score, unit, low, high in modules
    ]
    if index < len(points) and any(slopes):
        fixed = math.fsum(
            rank * unit for rank, unit, slope in zip(ranks_at(level), bounds.costs, slopes, strict=True) if not slope
        )
        level = min((budget - fixed) / math.fsum(slopes), points[index])
    return _spend_rest_on_unscored(ranks_at(level), scaled, bounds, budget)


def _spend_rest_on_unscored(ranks: list[float], scores: Sequence[float], bounds: Bounds, budget: float) -> list[float]:
    unscored = [index for index, score in enumerate(scores) if score <= 0]
    rest = budget - bounds.cost(ranks)
    if not unscored or rest <= 1e-6 * max(budget, 1.0):
        return ranks
    theirs = bounds.select(unscored)
    filled = _fill_equally(theirs, rest + theirs.cost(theirs.lower))
    for index, value in zip(unscored, filled, strict=True):
        ranks[index] = value
    return ranks


def _fill_equally(bounds: Bounds, budget: float) -> list[float]:
    return water_fill([1.0] * len(bounds.costs), bounds, budget) if bounds.costs else []


def _complete(ranks: list[int], ideal: Sequence[float], bounds: Bounds) -> int:
    """Add rank units by largest remainder while any still fits, and return the budget that is left."""
    costs, upper, left = bounds.costs, bounds.upper, bounds.budget - int(bounds.cost(ranks))
    heap = [(ranks[i] - ideal[i], i) for i in range(len(ranks)) if ranks[i] < upper[i]]
    heapq.heapify(heap)
    cheapest = min(costs, default=1)
    while heap and left >= cheapest:
        gap, index = heapq.heappop(heap)
        if costs[index] > left:  # what is left only shrinks, so this module is out for good
            continue
        ranks[index] += 1
        left -= costs[index]
        if ranks[index] < upper[index]:
            heapq.heappush(heap, (gap + 1, index))
    return left


def spend_rest(allocation: Allocation, bounds: Bounds, modules: Iterable[int]) -> Allocation:
    """Give one rank more to those of some modules, in order, that have one, as long as what is left pays for it.

    Args:
        allocation: ranks that have left some of the budget.
        bounds: budget and the largest ranks.
        modules: their numbers.
    """
    ranks, spent = list(allocation.ranks), allocation.spent
    for index in modules:
        if 0 < ranks[index] < bounds.upper[index] and spent + bounds.costs[index] <= bounds.budget:
            ranks[index] += 1
            spent += bounds.costs[index]
    return replace(allocation, ranks=tuple(ranks), spent=spent)


def keep_components(scores: Sequence[Sequence[float]], bounds: Bounds) -> list[list[bool]]:
    """Choose the rank-1 components to keep: every module's best ``lower``, then the globally best that still fit.

    Args:
        scores: per module, one finite score per component, higher is better.
        bounds: budget, and the fewest and most components of a module.

    Returns:
        Per module, which components stay. They never cost more than the budget, and what is left is smaller than the
        cheapest component that could still be added.

    Raises:
        InfeasibleBudgetError: the lower bounds alone cost more than the budget.
        ValueError: a score is infinite or NaN.
    """
    keep = [[False] * len(row) for row in scores]
    ranks, left, costs = [0] * len(scores), bounds.budget, bounds.costs
    later = []
    for module, row in enumerate(scores):
        if not all(map(math.isfinite, row)):
            raise ValueError(f"module {module} has a component whose score is not finite")
        order = sorted(range(len(row)), key=lambda index: -row[index])
        for position, index in enumerate(order):
            if position < bounds.lower[module]:
                keep[module][index] = True
                ranks[module] += 1
                left -= costs[module]
            else:
                later.append((-row[index], module, index))
    if left < 0:
        raise InfeasibleBudgetError(
            f"the lowest ranks alone cost {bounds.budget - left:,}, the budget is {bounds.budget:,}"
        )
    for _, module, index in sorted(later):
        if costs[module] <= left and ranks[module] < bounds.upper[module]:
            keep[module][index] = True
            ranks[module] += 1
            left -= costs[module]
    return keep


def reallocate_components(
    sensitivities: Sequence[float],
    scores: Sequence[Sequence[float]],
    on: Sequence[Sequence[bool]],
    bounds: Bounds,
) -> list[list[bool]]:
    """Divide the budget among modules in proportion to their sensitivities; ranks grow and shrink.

    A module that shrinks keeps its best components. One that grows turns on the first of those that are off, which
    have no meaningful score.

    Args:
        sensitivities: per module, a non-negative finite number.
        scores: per module, one non-negative finite score per component.
        on: per module, which components are in use.
        bounds: as in :func:`allocate`.

    Returns:
        Per module, which components are in use from now on; the cost is that of :func:`allocate`.

    Raises:
        InfeasibleBudgetError, ValueError: as :func:`allocate`.
    """
    ranks = allocate(sensitivities, bounds).ranks
    keep = []
    for row, flags, rank in zip(scores, on, ranks, strict=True):
        order = sorted(range(len(row)), key=lambda index: (not flags[index], -row[index] if flags[index] else 0.0))
        chosen = set(order[:rank])
        keep.append([index in chosen for index in range(len(row))])
    return keep
