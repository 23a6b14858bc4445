"""Cuts of a trained adapter to a budget: which singular components of all its modules stay, and what they keep.

Let sigma_i be the singular values of a module's update Delta W = scale * B A. Among all updates of rank r the one that
keeps the r largest is nearest to Delta W in the Frobenius norm, and what it loses is the sum of the other sigma_i^2
(Eckart and Young, Psychometrika 1936). One component costs d_in + d_out parameters, so over all modules those with the
largest sigma_i^2 / (d_in + d_out) stay. This is arithmetic on singular values: no torch.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llamafactory_adaptive.ranks.allocation import Bounds, keep_components
from llamafactory_adaptive.ranks.module_names import module_type
from llamafactory_adaptive.ranks.plan import ModuleShape


@dataclass(frozen=True)
class ModuleSpectrum:
    """The singular values of one module's update, largest first.

    Attributes:
        rank: the rank that the module's adapter was saved with.
    """

    shape: ModuleShape
    rank: int
    values: tuple[float, ...]

    @property
    def energy(self) -> float:
        """Return the sum of squared singular values."""
        return self.energy_from(0)

    def energy_from(self, first: int) -> float:
        """Sum the squares of the singular values from number ``first`` on: what a cut to that rank loses."""
        return math.fsum(value * value for value in self.values[first:])

    @property
    def used(self) -> int:
        """Return the number of components that are not zero."""
        return sum(value > 0 for value in self.values)


@dataclass(frozen=True)
class Cut:
    """Ranks to which the modules of an adapter are cut.

    Attributes:
        budget: number of parameters that was allowed.
        ranks: rank per module.
    """

    spectra: Sequence[ModuleSpectrum]
    budget: int
    ranks: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Count the parameters of the cut adapter."""
        return sum(rank * one.shape.parameters_per_rank for one, rank in zip(self.spectra, self.ranks, strict=True))

    @property
    def lost(self) -> float:
        """Return the sum of the squared singular values that the cut leaves out."""
        return math.fsum(one.energy_from(rank) for one, rank in zip(self.spectra, self.ranks, strict=True))

    @property
    def kept_share(self) -> float:
        """Return the share of the sum of squared singular values that the cut keeps."""
        return _kept(self.lost, math.fsum(one.energy for one in self.spectra))

    def kept_by_type(self) -> dict[str, float]:
        """Map each module type to the share of its sum of squared singular values that the cut keeps."""
        lost: dict[str, float] = {}
        total: dict[str, float] = {}
        for one, rank in zip(self.spectra, self.ranks, strict=True):
            kind = module_type(one.shape.name)
            lost[kind] = lost.get(kind, 0.0) + one.energy_from(rank)
            total[kind] = total.get(kind, 0.0) + one.energy
        return {kind: _kept(lost[kind], total[kind]) for kind in total}

    def by_name(self) -> dict[str, int]:
        """Map the full name of every module to its rank."""
        return {one.shape.name: rank for one, rank in zip(self.spectra, self.ranks, strict=True)}


def _kept(lost: float, total: float) -> float:
    return 1.0 - lost / total if total > 0 else 1.0


@dataclass(frozen=True)
class AdapterSpectrum:
    """The singular values of all modules of an adapter, and the fewest components that a module keeps.

    A cut keeps no component that is zero, but for those that ``min_rank`` asks for.
    """

    modules: tuple[ModuleSpectrum, ...]
    min_rank: int

    @cached_property
    def costs(self) -> list[int]:
        """List the parameters of one component of each module."""
        return [one.shape.parameters_per_rank for one in self.modules]

    @cached_property
    def lower(self) -> list[int]:
        """List the fewest components of each module."""
        return [min(self.min_rank, len(one.values)) for one in self.modules]

    @property
    def parameters(self) -> int:
        """Count the parameters of the adapter before any cut."""
        return sum(one.rank * cost for one, cost in zip(self.modules, self.costs, strict=True))

    @property
    def least(self) -> int:
        """Return the smallest budget: every module at its lowest rank, or where that is 0, one component in all."""
        lowest = sum(rank * cost for rank, cost in zip(self.lower, self.costs, strict=True))
        return lowest or min(self.costs)

    @property
    def energy(self) -> float:
        """Return the sum of squared singular values over all modules."""
        return math.fsum(one.energy for one in self.modules)

    def uniform(self, rank: int) -> int:
        """Count the parameters of an adapter that has this rank in every module."""
        return rank * sum(self.costs)

    @cached_property
    def _scores(self) -> list[list[float]]:
        return [[v * v / cost for v in one.values] for one, cost in zip(self.modules, self.costs, strict=True)]

    def cut(self, budget: int) -> Cut:
        """Keep the components with the most energy per parameter that fit into ``budget`` parameters.

        The parameters never exceed the budget, and what is left is smaller than the cheapest component that could
        still be added. A larger budget never keeps less energy.

        Raises:
            InfeasibleBudgetError: the lowest ranks alone cost more.
        """
        upper = [max(low, one.used) for low, one in zip(self.lower, self.modules, strict=True)]
        keep = keep_components(self._scores, Bounds(self.costs, budget, self.lower, upper))
        return Cut(self.modules, budget, tuple(map(sum, keep)))

    def cut_to_energy(self, share: float) -> Cut:
        """Find the smallest budget whose cut keeps at least a share (above 0, at most 1) of the energy."""
        allowed = (1.0 - share) * self.energy
        path = self.path
        index = next(i for i, (_, lost) in enumerate(path) if lost <= allowed)
        low, high = path[index - 1][0] + 1 if index else self.least, path[index][0]
        # A budget between two steps of the path may reach as far by smaller components that fit into it.
        offset = bisect.bisect_left(range(low, high), True, key=lambda budget: self.cut(budget).lost <= allowed)
        return self.cut(low + offset)

    @cached_property
    def path(self) -> list[tuple[int, float]]:
        """List parameters and lost energy when components are added one by one, by energy per parameter."""
        left = sorted(
            ((-score, cost) for row, cost, low in zip(self._scores, self.costs, self.lower, strict=True)
             for score in row[low:] if score > 0)
        )  # fmt: skip
        # Summed from the smallest on, so that nothing is left of the energy at the end, and little of it rounded off.
        losses = [0.0]
        for score, cost in reversed(left):
            losses.append(losses[-1] - score * cost)
        spent = [sum(rank * cost for rank, cost in zip(self.lower, self.costs, strict=True))]
        for _, cost in left:
            spent.append(spent[-1] + cost)
        path = list(zip(spent, reversed(losses), strict=True))
        return path if path[0][0] else path[1:]

    def knee(self) -> Cut:
        """Keep the components that hold more energy per parameter than the adapter's average.

        On the curve of kept energy over parameters, this is the point farthest above the straight line between its
        ends: from there on a parameter buys less than the average.
        """
        full, energy = self.path[-1][0], self.energy
        return self.cut(max(self.path, key=lambda point: _kept(point[1], energy) - point[0] / full)[0])

    def budgets(self, count: int) -> list[int]:
        """List budgets on a geometric grid: from the whole adapter down to 2^-(count-1) of it or the smallest one."""
        full = self.parameters
        last = max(self.least, math.ceil(full / 2 ** (count - 1)))
        budgets = [round(full * (last / full) ** (step / (count - 1))) for step in range(count - 1)]
        return list(dict.fromkeys([*budgets, last]))
