"""State of the rank search: the components in use, their scores, and the plan that follows from them.

Pure Python without torch and without a Trainer; ``RankSearchDriver`` drives it.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.errors import DivergedError, GuardError
from llamafactory_adaptive.ranks.allocation import Bounds, allocate, reallocate_components
from llamafactory_adaptive.ranks.module_groups import packed_groups
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.search_config import ExchangeConfig, ReallocationConfig
from llamafactory_adaptive.ranks.whole_groups import keep_whole_groups


Masks = list[list[bool]]
Exchange = Callable[[Sequence[Sequence[float]], Masks, Masks, Bounds], Masks]  # scores, in use, of those new, bounds
_STORED = ("final", "history", "module_scores", "metrics", "sensitivities", "fresh")  # in a checkpoint


class RankSearchState:
    """The decisions of a rank search so far, from the ranks at the start to the plan at the end.

    Args:
        start: plan with the ranks of the tensors that train.
        config: budget unit, bounds, and how ranks change; where they do not, they are final from the start.
    """

    def __init__(self, start: RankPlan, config: AdaptiveConfig) -> None:
        self.start, self.config = start, config
        self.costs = [module.cost(config.budget_unit) for module in start.modules]
        self.final = config.search is None
        self.history: list[dict[str, Any]] = []
        self.module_scores: list[float] = [0.0] * len(start.modules)
        self.metrics: dict[str, float] = {}
        self.sensitivities: list[float] = [0.0] * len(start.modules)
        self.fresh: Masks = [[False] * module.rank for module in start.modules]
        upper = [min(config.max_rank, module.rank) for module in start.modules]
        lower = [min(config.min_rank, high) for high in upper]
        self.bounds = Bounds(self.costs, self.final_budget, lower, upper)
        self.packed = packed_groups([module.name for module in start.modules])

    @property
    def reallocates(self) -> bool:
        """Tell whether ranks move between modules under a constant budget, rather than fall."""
        return isinstance(self.config.search, ReallocationConfig)

    @property
    def exchanges(self) -> bool:
        """Tell whether the method itself exchanges components under a constant budget."""
        return isinstance(self.config.search, ExchangeConfig)

    def first_masks(self) -> Masks:
        """Return the masks of the start: all components, or equal ranks within the budget if that is constant."""
        if not (self.reallocates or self.exchanges):
            return [[True] * module.rank for module in self.start.modules]
        ranks = allocate([1.0] * len(self.costs), self.bounds).ranks
        return [
            [index < rank for index in range(module.rank)]
            for module, rank in zip(self.start.modules, ranks, strict=True)
        ]

    @property
    def final_budget(self) -> int:
        """Return the final budget, in budget units."""
        return self.start.lora_rank * sum(self.costs)

    def cost(self, masks: Masks) -> int:
        """Compute the cost of the components in use, in budget units."""
        return sum(cost * sum(row) for cost, row in zip(self.costs, masks, strict=True))

    def choose(
        self,
        step: int,
        scores: Sequence[Sequence[float]],
        budget: int,
        before: Masks,
        hysteresis: float = 0.0,
        used_first: bool = False,
        exchange: Exchange | None = None,
    ) -> Masks:
        """Choose the components to use under ``budget`` and the configured bounds.

        Args:
            step: optimizer steps so far, for the message of an error.
            scores: score of every component, by module.
            budget: most budget units that they may cost.
            before: components in use now.
            hysteresis: share by which the scores of those are raised; read where ranks are pruned.
            used_first: whether they are all kept before any other; read where ranks are pruned.
            exchange: the choice of a method that exchanges components.

        Raises:
            DivergedError: a score is not finite.
            GuardError: the method's own choice does not keep the bounds.
        """
        bounds = replace(self.bounds, budget=budget)
        if exchange is None:
            with _told_as_divergence(step):
                after = self._allocated(scores, before, bounds, hysteresis, used_first)
        else:
            with _told_as_divergence(step):
                _check_finite(scores)
            after = _checked(exchange(scores, before, self.fresh, bounds), before, bounds)
        self.fresh = [
            [new and not old for old, new in zip(*rows, strict=True)] for rows in zip(before, after, strict=True)
        ]
        return after

    def _allocated(
        self, scores: Sequence[Sequence[float]], before: Masks, bounds: Bounds, hysteresis: float, used_first: bool
    ) -> Masks:
        """Choose components by the scores alone: by those of their modules, or one by one."""
        if self.reallocates:
            self._learn(scores, before)
            return reallocate_components(self.sensitivities, scores, before, bounds)
        return keep_whole_groups(favour_used(scores, before, hysteresis, used_first), bounds, self.packed)

    def _learn(self, scores: Sequence[Sequence[float]], on: Masks) -> None:
        """Update the running sensitivities of the modules with the scores of an interval.

        A module's sensitivity in an interval is the mean score of its components in use, as a share of the sum over
        modules. Components that came back when the interval began are left out, as their B started at zero. Earlier
        intervals are discounted by ``beta``; without them a module that grew would look insensitive, since its new
        components are still small, and would shrink again.
        """
        means = []
        for module, (row, flags, fresh) in enumerate(zip(scores, on, self.fresh, strict=True)):
            judged = [score for score, flag, new in zip(row, flags, fresh, strict=True) if flag and not new]
            means.append(sum(judged) / len(judged))  # of a module's components the best always stay
            if not math.isfinite(means[-1]):
                raise ValueError(f"module {module} has a component whose score is not finite")
        total = sum(means) or 1.0
        beta = self.config.search.beta  # type: ignore[union-attr]
        self.sensitivities = [beta * old + new / total for old, new in zip(self.sensitivities, means, strict=True)]

    def record(
        self, step: int, budget: int, final: bool, scores: Sequence[Sequence[float]], before: Masks, after: Masks
    ) -> dict[str, Any]:
        """Store a choice of components, and return its line for the log."""
        self.final = final
        kept = zip(scores, after, strict=True)
        self.module_scores = (
            self.sensitivities
            if self.reallocates
            else [sum(score for score, on in zip(row, flags, strict=True) if on) for row, flags in kept]
        )
        ranks = [(sum(old), sum(new)) for old, new in zip(before, after, strict=True)]
        line: dict[str, Any] = {
            "step": step,
            "event": "allocation",
            "budget_asked": budget,
            "budget_used": self.cost(after),
            "components_changed": sum(
                a != b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True)
            ),
            "grown": sum(new > old for old, new in ranks),
            "shrunk": sum(new < old for old, new in ranks),
            "final": final,
            "ranks": [new for _, new in ranks],
        }
        self.history.append({key: line[key] for key in ("step", "budget_asked", "budget_used", "ranks")})
        figures = ("budget_asked", "budget_used", "components_changed", "grown", "shrunk")
        self.metrics = {f"adaptive/{key}": float(line[key]) for key in figures}
        self.metrics["adaptive/mean_rank"] = sum(line["ranks"]) / len(ranks)
        return line

    def plan(self, masks: Masks) -> RankPlan:
        """Return the start plan with the ranks of ``masks``, and the scores that led to them."""
        total = sum(self.module_scores) or 1.0
        modules = tuple(
            replace(module, rank=sum(row), score=score, share=score / total)
            for module, row, score in zip(self.start.modules, masks, self.module_scores, strict=True)
        )
        return replace(self.start, modules=modules)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores of the search."""
        return {key: getattr(self, key) for key in _STORED}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        for key in _STORED:
            setattr(self, key, state[key])


@contextmanager
def _told_as_divergence(step: int) -> Iterator[None]:
    """Convert what is said of scores that are not finite to the error of a diverged run."""
    try:
        yield
    except ValueError as error:
        raise DivergedError(f"step {step}: {error}; training has diverged, lower learning_rate") from error


def _check_finite(scores: Sequence[Sequence[float]]) -> None:
    for module, row in enumerate(scores):
        if not all(map(math.isfinite, row)):
            raise ValueError(f"module {module} has a component whose score is not finite")


def _checked(after: Masks, before: Masks, bounds: Bounds) -> Masks:
    """Return a method's own choice if it has the form of the masks before, and keeps budget and bounds."""
    if [len(row) for row in after] != [len(row) for row in before]:
        raise GuardError(f"the method chose among {len(after)} modules or other components than there are")
    ranks = counts(after)
    if bounds.cost(ranks) > bounds.budget or not all(
        low <= rank <= high for low, rank, high in zip(bounds.lower, ranks, bounds.upper, strict=True)
    ):
        raise GuardError(f"the method chose ranks out of bounds, or above the budget of {bounds.budget:,}: {ranks}")
    return after


def counts(masks: Masks) -> list[int]:
    """Count the components in use of every module."""
    return [sum(row) for row in masks]


def favour_used(
    scores: Sequence[Sequence[float]], on: Masks, hysteresis: float, used_first: bool
) -> Sequence[Sequence[float]]:
    """Adjust non-negative scores for a comparison in which components in use have the advantage.

    Args:
        scores: score of every component, by module.
        on: components in use.
        hysteresis: share by which their scores are raised: others replace them only if they are that much better.
        used_first: whether they are above all others, whatever the scores.
    """
    if not hysteresis and not used_first:
        return scores

    below: dict[float, float] = {}
    if used_first:
        pairs = (pair for rows in zip(scores, on, strict=True) for pair in zip(*rows, strict=True))
        unused = sorted({score for score, used in pairs if not used and math.isfinite(score)}, reverse=True)
        # Between -1 and 0 in the order of the scores, however small all of them are; what is not finite stays so, for
        # the check that follows.
        below = {score: -(place + 1) / (len(unused) + 1) for place, score in enumerate(unused)}

    def compared(score: float, used: bool) -> float:
        return score * (1.0 + hysteresis) if used else below.get(score, score)

    return [[compared(*pair) for pair in zip(*rows, strict=True)] for rows in zip(scores, on, strict=True)]
