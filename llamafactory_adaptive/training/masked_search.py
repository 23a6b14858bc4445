"""A search for ranks on the model of a Trainer: the adapter as masked triplets, and the state of the search."""

from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.methods import DynamicMethod
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.schedule import PruningConfig, ReallocationConfig
from llamafactory_adaptive.training.rank_search import RankSearchState


@dataclass(frozen=True)
class SearchRequest:
    """Settings of a search for ranks.

    Attributes:
        start: plan with the ranks of the tensors that train.
        config: configuration, whose ``search`` holds how ranks change while training.
        method: dynamic method that observes gradients and scores components.
    """

    start: RankPlan
    config: AdaptiveConfig
    method: DynamicMethod

    @property
    def schedule(self) -> PruningConfig | ReallocationConfig:
        """Return the settings by which ranks change while training."""
        assert self.config.search is not None
        return self.config.search

    @property
    def slowdown(self) -> float:
        """Return how many times smaller the first AdamW update is than plain LoRA's with the same settings."""
        return self.method.initial_adapter.slowdown(self.start.active) * self.config.weakening


class MaskedSearch:
    """The adapter of one model, turned into masked triplets before the optimizer is made, and the search's decisions.

    Args:
        request: settings of the search.
        trainer: Trainer whose model has the adapter of ``request.start``.
    """

    def __init__(self, request: SearchRequest, trainer: Any) -> None:
        self.request, self.trainer = request, trainer
        self.state = RankSearchState(request.start, request.config)
        start, seed = request.method.initial_adapter, request.schedule.seed
        self.triplets = Triplets(trainer.model, request.start, start.lambda_value, start.factors, seed)
        self.triplets.mask(self.state.first_masks())
        self.set_strength()

    def set_strength(self) -> None:
        """Set the strength of the adapter outside of training steps; 1 once the ranks are final."""
        position = self.triplets.position
        shrinkage = None if self.state.final else self.request.method.shrinkage
        position.strength = 1.0 if shrinkage is None else shrinkage.strength
        position.leave()

    def plan(self) -> RankPlan:
        """Return the plan whose ranks count the components in use."""
        return self.state.plan(self.triplets.masks)
