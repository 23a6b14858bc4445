"""A search for ranks once its Trainer is known: the adapter in its live form, and the state of the search."""

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
    """A search for ranks that is asked for.

    Attributes:
        start: the plan of the live tensors.
        config: with how ranks change while training.
        method: what observes and scores.
    """

    start: RankPlan
    config: AdaptiveConfig
    method: DynamicMethod

    @property
    def schedule(self) -> PruningConfig | ReallocationConfig:
        """How ranks change while training."""
        assert self.config.search is not None
        return self.config.search


class MaskedSearch:
    """Turns the adapter of one model into masked triplets, before an optimizer is made.

    Args:
        request: what is searched for, and how.
        trainer: whose model has the adapter of ``request.start``.
    """

    def __init__(self, request: SearchRequest, trainer: Any) -> None:
        self.request, self.trainer = request, trainer
        self.state = RankSearchState(request.start, request.config)
        self.triplets = Triplets(trainer.model, request.start, request.method.initial_lambda, request.schedule.seed)
        self.triplets.mask(self.state.first_masks())

    def plan(self) -> RankPlan:
        """Give the plan that the masks amount to."""
        return self.state.plan(self.triplets.masks)
