"""The course of a dynamic run: which components were chosen, when and why, and the plan they make up.

Knows neither Trainer nor tensors; ``dynamic`` drives it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llamafactory_adaptive.allocate import allocate, keep_components, reallocate_components
from llamafactory_adaptive.config import AdaptiveConfig, ReallocationConfig
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.plan import RankPlan


Masks = list[list[bool]]


class Course:
    """From the ranks at the start to the ranks found.

    Args:
        start: the plan of the live tensors.
        config: with budget unit and bounds, and how ranks change.
    """

    def __init__(self, start: RankPlan, config: AdaptiveConfig) -> None:
        self.start, self.config = start, config
        self.costs = [module.cost(config.budget_unit) for module in start.modules]
        self.final = False
        self.history: list[dict[str, Any]] = []
        self.module_scores: list[float] = [0.0] * len(start.modules)
        self.metrics: dict[str, float] = {}
        self.upper = [min(config.max_rank, module.rank) for module in start.modules]
        self.lower = [min(config.min_rank, high) for high in self.upper]

    @property
    def reallocates(self) -> bool:
        """Whether ranks move about under a constant budget, rather than fall."""
        return isinstance(self.config.course, ReallocationConfig)

    def first_masks(self) -> Masks:
        """What is in use at first: everything, or every module at the same rank within the budget."""
        if not self.reallocates:
            return [[True] * module.rank for module in self.start.modules]
        ranks = allocate([1.0] * len(self.costs), self.costs, self.asked, self.lower, self.upper).ranks
        return [
            [index < rank for index in range(module.rank)]
            for module, rank in zip(self.start.modules, ranks, strict=True)
        ]

    @property
    def asked(self) -> int:
        """The budget in the end, in budget units."""
        return self.start.lora_rank * sum(self.costs)

    def cost(self, masks: Masks) -> int:
        """Budget units of the components in use."""
        return sum(cost * sum(row) for cost, row in zip(self.costs, masks, strict=True))

    def choose(self, step: int, scores: Sequence[Sequence[float]], budget: int, before: Masks) -> Masks:
        """Components to use under ``budget`` and the configured bounds; ``before`` are those in use now.

        Raises:
            GuardError: a score is not finite.
        """
        try:
            if self.reallocates:
                return reallocate_components(scores, before, self.costs, budget, self.lower, self.upper)
            return keep_components(scores, self.costs, budget, self.lower, self.upper)
        except ValueError as error:
            raise GuardError(f"step {step}: {error}; training has diverged, lower learning_rate") from error

    def record(
        self, step: int, budget: int, final: bool, scores: Sequence[Sequence[float]], before: Masks, after: Masks
    ) -> dict[str, Any]:
        """Take note of a choice; returns its line for the log."""
        self.final = final
        used = [
            [score for score, on in zip(row, flags, strict=True) if on]
            for row, flags in zip(scores, before if self.reallocates else after, strict=True)
        ]
        self.module_scores = [sum(row) / len(row) if row and self.reallocates else sum(row) for row in used]
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

    def found(self, masks: Masks) -> RankPlan:
        """The start plan at the ranks now in use, with the scores that led to them."""
        total = sum(self.module_scores) or 1.0
        modules = tuple(
            replace(module, rank=sum(row), score=score, share=score / total)
            for module, row, score in zip(self.start.modules, masks, self.module_scores, strict=True)
        )
        return replace(self.start, modules=modules)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {key: getattr(self, key) for key in ("final", "history", "module_scores", "metrics")}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
        for key in self.state():
            setattr(self, key, state[key])
