"""Which runs a comparison makes: a grid of learning rates per arm, then other seeds at the arm's best one.

The seeds that choose do not judge: a run that was picked as the best of many was lucky, too. What is due follows from
what the ledger holds and from nothing else, so that a comparison goes on after any end.
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


@dataclass(frozen=True)
class Design:
    """What all arms have in common.

    Attributes:
        rates: learning rates of the first grid, the same for every arm.
        alphas: values of ``lora_alpha``, each with every rate; (None,) for that of the YAML alone.
        seeds: number of seeds at the best point, which judge.
        rate_seeds: number of seeds that choose it, none of which judges.
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
    def all_seeds(self) -> int:
        """Return the number of seeds that choose or judge."""
        return self.rate_seeds + self.seeds

    @property
    def grid(self) -> list[GridPoint]:
        """Return the first grid."""
        return [GridPoint(rate, alpha) for alpha in self.alphas for rate in sorted(self.rates)]

    def choosing(self, arm: str, point: GridPoint) -> list[Run]:
        """List the runs by which a point is compared with others of the arm."""
        steps = self.steps if self.steps_for_rates is None else self.steps_for_rates
        return [Run(arm, point, seed, steps) for seed in range(self.rate_seeds)]

    def final(self, arm: str, point: GridPoint) -> list[Run]:
        """List the runs at the best point, which the arm is judged by: their seeds chose nothing."""
        return [Run(arm, point, self.rate_seeds + seed, self.steps) for seed in range(self.seeds)]

    def judges(self, run: Run) -> bool:
        """Tell whether an arm is judged by this run, if its point is the best."""
        return run.seed >= self.rate_seeds

    def fewest_runs(self, arms: int) -> int:
        """Count the runs of all arms if no grid is extended and no rate diverges."""
        return arms * (len(self.grid) * self.rate_seeds + self.seeds)


@dataclass(frozen=True)
class Choice:
    """An arm's curve over its grid, and the best point.

    Attributes:
        curve: figure on the dev half by point, over the seeds that choose; infinite where a run diverged.
        best: point of the lowest figure; None if all diverged.
        at_the_edge: whether the best rate is the lowest or the highest of the grid at its alpha, or the only one.
        alpha_at_the_edge: whether the best alpha is the lowest or the highest of several.
        unstable: points at which no run that chooses diverged, but one that judges did, so that they are not the best.
    """

    curve: dict[GridPoint, float]
    best: GridPoint | None
    at_the_edge: bool = False
    alpha_at_the_edge: bool = False
    unstable: tuple[GridPoint, ...] = ()


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
        self.too_large: set[str] = set()  # those of them that are not judged at all

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
        """List the runs that are not known, up to the first seed that diverged: its point is out."""
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
            curve = self._curve(arm, grid)
            choice = None if curve is None else _choice(curve, ())
            if choice is None or choice.best is None or not choice.at_the_edge:
                break
            rates = [point.rate for point in grid if point.alpha == choice.best.alpha]
            beyond = choice.best.rate * (_FACTOR if choice.best.rate == max(rates) else 1.0 / _FACTOR)
            grid = [*grid, GridPoint(beyond, choice.best.alpha)]
        return grid

    def _curve(self, arm: str, grid: Sequence[GridPoint]) -> dict[GridPoint, float] | None:
        """Return the figure of each point; None where a run that chooses is not known yet."""
        curve = {}
        for point in grid:
            runs = self.design.choosing(arm, point)
            if self._unknown(runs):
                return None
            curve[point] = self._mean(runs)
        return curve

    def _mean(self, runs: Sequence[Run]) -> float:
        figures = []
        for run in runs:
            outcome = self.known(run)
            if outcome is None or outcome["status"] == "diverged":
                return math.inf
            figures.append(self.figure(outcome, "dev"))
        return statistics.fmean(figures)

    def choice_if_known(self, arm: str) -> Choice | None:
        """Return the curve and the best point of an arm; None where its grid is not complete."""
        curve = self._curve(arm, self._grid(arm))
        if curve is None:
            return None
        unstable = (point for point, figure in curve.items() if math.isfinite(figure) and self._diverged(arm, point))
        return _choice(curve, tuple(unstable))

    def choosing_rows(self, arm: str, point: GridPoint) -> list[Any]:
        """Return the losses of the rows that choose, of every seed that does, at a point where none diverged."""
        outcomes = map(self.known, self.design.choosing(arm, point))
        return [outcome["dev"] for outcome in outcomes if outcome is not None]

    def _diverged(self, arm: str, point: GridPoint) -> bool:
        outcomes = map(self.known, self.design.final(arm, point))
        return any(outcome is not None and outcome["status"] == "diverged" for outcome in outcomes)

    def choice(self, arm: str) -> Choice:
        """Return the curve and the best point of an arm whose grid is complete."""
        choice = self.choice_if_known(arm)
        assert choice is not None
        return choice

    def finals(self, arm: str) -> dict[int, Outcome]:
        """Return what came of the finished runs that judge an arm, by seed; none where it is too large."""
        choice = self.choice_if_known(arm)
        if choice is None or choice.best is None or arm in self.too_large:
            return {}
        outcomes = {run.seed: self.known(run) for run in self.design.final(arm, choice.best)}
        return {seed: outcome for seed, outcome in outcomes.items() if outcome is not None}

    def left(self) -> list[Run]:
        """List the runs that are left, those under way among them, if no grid is extended and no rate diverges."""
        return [run for arm in self.arms for run in self.left_of(arm.name)]

    def left_of(self, arm: str) -> list[Run]:
        """List the runs of an arm that are left, as :meth:`left` does for all; none if it is given up.

        Where its best point is not known yet, those that judge are at the first point of the grid.
        """
        if arm in self.failed:
            return []
        finals = self.design.final(arm, self.design.grid[0]) if self.choice_if_known(arm) is None else []
        return [*self._due(arm), *finals]

    def give_up_larger_arms(self) -> dict[str, str]:
        """Give up adaptive arms whose saved adapters have more parameters than plain LoRA's; return why, by name."""
        most = max((outcome["parameters"] for outcome in self._saved(self.arms[0].name)), default=math.inf)
        adaptive = [arm.name for arm in self.arms if arm.settings.get("finetuning_type") == "adaptive"]
        reasons = {}
        for arm in (name for name in adaptive if name not in self.failed):
            if (size := max((outcome["parameters"] for outcome in self._saved(arm)), default=0)) > most:
                reasons[arm] = (
                    f"its adapter has {size:,} parameters and plain LoRA's has {most:,}, so that the budgets are "
                    "not equal; set adaptive_budget_unit: params"
                )
        self.failed |= reasons
        self.too_large |= set(reasons)
        return reasons

    def _saved(self, arm: str) -> list[Outcome]:
        runs = [run for point in self._grid(arm) for run in self.design.choosing(arm, point)]
        outcomes = [*map(self.known, runs), *self.finals(arm).values()]
        return [outcome for outcome in outcomes if outcome is not None and "parameters" in outcome]


def _choice(curve: dict[GridPoint, float], unstable: tuple[GridPoint, ...]) -> Choice:
    """Choose the point of the lowest figure that is not unstable."""
    stable = {point: math.inf if point in unstable else figure for point, figure in curve.items()}
    best = min(stable, key=stable.__getitem__)
    if math.isinf(stable[best]):
        return Choice(curve, None, unstable=unstable)
    rates = [point.rate for point in curve if point.alpha == best.alpha]
    alphas = {point.alpha for point in curve}
    ends = len(alphas) > 1 and best.alpha in (min(alphas, key=_alpha), max(alphas, key=_alpha))
    return Choice(curve, best, best.rate in (min(rates), max(rates)), ends, unstable)


def _alpha(alpha: float | None) -> float:
    return alpha or 0.0
