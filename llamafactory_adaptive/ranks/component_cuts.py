"""Cuts of a trained adapter to a budget: which singular components of all its modules stay, and what they keep.

Let sigma_i be the singular values of a module's update Delta W = scale * B A. Among all updates of rank r the one that
keeps the r largest is nearest to Delta W in the Frobenius norm, and what it loses is the sum of the other sigma_i^2
(Eckart and Young, Psychometrika 1936). One component costs d_in + d_out parameters, so over all modules those with the
largest sigma_i^2 / (d_in + d_out) stay. This is arithmetic on singular values: no torch.

Where modules may lose their adapters, those that servers keep packed (q, k, v; gate, up) do so together
(``ranks.whole_groups``).
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llamafactory_adaptive.errors import InfeasibleBudgetError
from llamafactory_adaptive.ranks.module_groups import packed_groups
from llamafactory_adaptive.ranks.module_names import module_type
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.ranks.whole_groups import Step, in_order, ranks_within, steps_of, units_of


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
    def _lowest(self) -> int:
        return sum(rank * cost for rank, cost in zip(self.lower, self.costs, strict=True))

    @property
    def parameters(self) -> int:
        """Count the parameters of the adapter before any cut."""
        return sum(one.rank * cost for one, cost in zip(self.modules, self.costs, strict=True))

    @property
    def least(self) -> int:
        """Return the smallest budget: every module at its lowest rank, or where that is 0, the cheapest beginning."""
        return self._lowest or min(step.cost for steps in self._ordered for step in steps if not step.position)

    @property
    def energy(self) -> float:
        """Return the sum of squared singular values over all modules."""
        return math.fsum(one.energy for one in self.modules)

    def uniform(self, rank: int) -> int:
        """Count the parameters of an adapter that has this rank in every module."""
        return rank * sum(self.costs)

    @cached_property
    def _units(self) -> list[list[int]]:
        """List the numbers of the modules that have an adapter together or not at all."""
        packed = [] if self.min_rank else packed_groups([one.shape.name for one in self.modules])
        return units_of(len(self.modules), packed)

    @cached_property
    def _ordered(self) -> list[list[Step]]:
        """List what can be added to the lowest ranks, and is not zero, by energy per parameter."""
        worths = [
            [value * value for value in one.values[low:]] for one, low in zip(self.modules, self.lower, strict=True)
        ]
        units = (steps_of(unit, members, worths, self.costs) for unit, members in enumerate(self._units))
        return in_order([[step for step in steps if step.worth > 0] for steps in units])

    def cut(self, budget: int) -> Cut:
        """Keep the components with the most energy per parameter that fit into ``budget`` parameters.

        The parameters never exceed the budget, and what is left is smaller than the cheapest component, or packed
        group, that could still be added. A larger budget never keeps less energy, unless packed groups may lose their
        adapters: what fits in place of the last of them may hold a little less.

        Raises:
            InfeasibleBudgetError: the lowest ranks alone cost more.
        """
        lowest = self._lowest
        if lowest > budget:
            raise InfeasibleBudgetError(f"the lowest ranks alone cost {lowest:,}, the budget is {budget:,}")
        return Cut(self.modules, budget, tuple(ranks_within(self._ordered, budget - lowest, self.lower)))

    def cut_to_energy(self, share: float) -> Cut:
        """Find the smallest budget whose cut keeps at least a share (above 0, at most 1) of the energy.

        Where packed groups may lose their adapters, a budget that is a little smaller may do as well by chance.
        """
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
        added = [(math.fsum(s.worth for s in steps), sum(s.cost for s in steps)) for steps in self._ordered]
        # Summed from the smallest on, so that nothing is left of the energy at the end, and little of it rounded off.
        losses = [0.0]
        for energy, _ in reversed(added):
            losses.append(losses[-1] + energy)
        spent = [self._lowest]
        for _, cost in added:
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
