"""Which runs a comparison makes: a grid of learning rates per arm, then all seeds at the arm's best one.

What is due follows from what the ledger holds and from nothing else, so that a comparison goes on after any end.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.comparison.arms import Arm, GridPoint


Outcome = Mapping[str, Any]
_FACTOR = 2.0  # between a grid's end and the rate by which it is extended


@dataclass(frozen=True)
class Run:
    """One run: an arm at a point of its grid, with a seed and a number of steps."""

    arm: str
    point: GridPoint
    seed: int
    steps: int | None

    @property
    def key(self) -> dict[str, Any]:
        """Return what the ledger keys the run by, beside its settings."""
        return {"arm": self.arm, "rate": self.point.rate, "alpha": self.point.alpha, "seed": self.seed,
                "steps": self.steps}  # fmt: skip


@dataclass(frozen=True)
class Design:
    """What all arms have in common.

    Attributes:
        rates: learning rates of the first grid, the same for every arm.
        alphas: values of ``lora_alpha``, each with every rate; (None,) for that of the YAML alone.
        seeds: number of seeds at the best point.
        rate_seeds: number of seeds that choose it.
        steps: optimizer steps of the final runs; None for those of the YAML.
        steps_for_rates: optimizer steps of the runs that choose; None for as many as the final ones.
        extensions: how often a grid is extended by a factor of two beyond an end that is best.
    """

    rates: tuple[float, ...]
    alphas: tuple[float | None, ...] = (None,)
    seeds: int = 5
    rate_seeds: int = 1
    steps: int | None = None
    steps_for_rates: int | None = None
    extensions: int = 2

    @property
    def grid(self) -> list[GridPoint]:
        """Return the first grid."""
        return [GridPoint(rate, alpha) for alpha in self.alphas for rate in sorted(self.rates)]

    def choosing(self, arm: str, point: GridPoint) -> list[Run]:
        """List the runs by which a point is compared with others of the arm."""
        steps = self.steps if self.steps_for_rates is None else self.steps_for_rates
        return [Run(arm, point, seed, steps) for seed in range(self.rate_seeds)]

    def final(self, arm: str, point: GridPoint) -> list[Run]:
        """List the runs at the best point, which the arm is judged by."""
        return [Run(arm, point, seed, self.steps) for seed in range(self.seeds)]

    @property
    def made_twice(self) -> int:
        """Count the runs of the best point that its choice makes already."""
        point = self.grid[0]
        return len(set(self.choosing("", point)) & set(self.final("", point)))

    def fewest_runs(self, arms: int) -> int:
        """Count the runs of all arms if no grid is extended and no rate diverges."""
        return arms * (len(self.grid) * self.rate_seeds + self.seeds - self.made_twice)


@dataclass(frozen=True)
class Choice:
    """An arm's curve over its grid, and the best point.

    Attributes:
        curve: figure on the dev half by point, over the seeds that choose; infinite where a run diverged.
        best: point of the lowest figure; None if all diverged.
        at_the_edge: whether the best rate is the lowest or the highest of the grid at its alpha.
    """

    curve: dict[GridPoint, float]
    best: GridPoint | None
    at_the_edge: bool


class Progress:
    """What is known of each arm, and which runs are due next.

    Args:
        design: what all arms have in common.
        arms: the arms, in order.
        known: returns what came of a run, or None if that is not known yet.
        figure: turns a finished run's losses of one half into the figure that is compared; lower is better.
    """

    def __init__(
        self,
        design: Design,
        arms: Sequence[Arm],
        known: Callable[[Run], Outcome | None],
        figure: Callable[[Outcome, str], float],
    ) -> None:
        self.design, self.arms, self.known, self.figure = design, arms, known, figure
        self.failed: dict[str, str] = {}  # arms that are given up, and why

    def due(self) -> list[Run]:
        """List the runs that can be made now, arm by arm; empty at the end."""
        return [run for arm in self.arms if arm.name not in self.failed for run in self._due(arm.name)]

    def _due(self, arm: str) -> list[Run]:
        choosing = [run for point in self._grid(arm) for run in self._unknown(self.design.choosing(arm, point))]
        if choosing:
            return choosing
        best = self.choice(arm).best
        return [] if best is None else self._unknown(self.design.final(arm, best))

    def _unknown(self, runs: Sequence[Run]) -> list[Run]:
        """List the runs that are not known, up to the first seed that diverged: the others would, too."""
        due = []
        for run in runs:
            outcome = self.known(run)
            if outcome is None:
                due.append(run)
            elif outcome["status"] == "diverged":
                return []
        return due

    def _grid(self, arm: str) -> list[GridPoint]:
        """Return the first grid, extended beyond an end that was best, as often as is allowed."""
        grid = self.design.grid
        for _ in range(self.design.extensions):
            choice = self._choice_among(arm, grid)
            if choice is None or choice.best is None or not choice.at_the_edge:
                break
            rates = [point.rate for point in grid if point.alpha == choice.best.alpha]
            beyond = choice.best.rate * (_FACTOR if choice.best.rate == max(rates) else 1.0 / _FACTOR)
            grid = [*grid, GridPoint(beyond, choice.best.alpha)]
        return grid

    def _choice_among(self, arm: str, grid: Sequence[GridPoint]) -> Choice | None:
        """Choose the best of some points; None where one of their runs is not known yet."""
        curve = {}
        for point in grid:
            runs = self.design.choosing(arm, point)
            if self._unknown(runs):
                return None
            curve[point] = self._mean(runs)
        best = min(curve, key=curve.__getitem__)
        if math.isinf(curve[best]):
            return Choice(curve, None, at_the_edge=False)
        rates = [point.rate for point in curve if point.alpha == best.alpha]
        return Choice(curve, best, len(rates) > 1 and best.rate in (min(rates), max(rates)))

    def _mean(self, runs: Sequence[Run]) -> float:
        figures = []
        for run in runs:
            outcome = self.known(run)
            if outcome is None or outcome["status"] == "diverged":
                return math.inf
            figures.append(self.figure(outcome, "dev"))
        return statistics.fmean(figures)

    def choice(self, arm: str) -> Choice:
        """Return the curve and the best point of an arm whose grid is complete."""
        choice = self._choice_among(arm, self._grid(arm))
        assert choice is not None
        return choice

    def finals(self, arm: str) -> list[Outcome]:
        """List what came of the finished runs at an arm's best point, by seed."""
        best = self.choice(arm).best
        found = [] if best is None else [self.known(run) for run in self.design.final(arm, best)]
        return [outcome for outcome in found if outcome is not None]

    def runs_left(self) -> int:
        """Estimate how many runs are left, if no grid is extended further and no rate diverges."""
        left = 0
        for arm in (each.name for each in self.arms if each.name not in self.failed):
            undecided = self._choice_among(arm, self._grid(arm)) is None
            left += len(self._due(arm)) + (self.design.seeds - self.design.made_twice if undecided else 0)
        return left
