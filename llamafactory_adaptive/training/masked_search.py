"""A search for ranks on the model of a Trainer: the adapter as masked triplets, and the state of the search.

Where ranks are given, all components are in use, and the search has ended before it begins.
"""

from dataclasses import dataclass, replace
from typing import Any

from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.methods import DynamicMethod, make_method
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.ranks.search_config import GivenRanksConfig, SearchConfig
from llamafactory_adaptive.training.guard import uses_deepspeed
from llamafactory_adaptive.training.rank_search import RankSearchState


@dataclass(frozen=True)
class SearchRequest:
    """Settings of a search for ranks.

    Attributes:
        start: plan with the ranks of the tensors that train.
        config: configuration, whose ``search`` holds how ranks change while training, or whose ``given`` that they
            do not.
        method: dynamic method that observes gradients and scores components; on given ranks it does neither.
    """

    start: RankPlan
    config: AdaptiveConfig
    method: DynamicMethod

    @property
    def schedule(self) -> SearchConfig | GivenRanksConfig:
        """Return the settings by which ranks change while training, or do not."""
        schedule = self.config.search or self.config.given
        assert schedule is not None
        return schedule

    @property
    def slowdown(self) -> float:
        """Return how many times smaller a component's first AdamW update is than plain LoRA's with the same settings.

        Of one component, not of a module: the surplus that a search begins with makes a module's first update
        sqrt(init_rank / lora_rank) times larger, and is gone where the search ends.
        """
        return self.method.initial_adapter.slowdown(self.start.active) * self.config.weakening


class MaskedSearch:
    """The adapter of one model, turned into masked triplets before the optimizer is made, and the search's decisions.

    Args:
        request: settings of the search.
        trainer: Trainer whose model has the adapter of ``request.start``.
    """

    def __init__(self, request: SearchRequest, trainer: Any) -> None:
        self.request, self.trainer = request, trainer
        self.state = self._first_state()
        start, seed = request.method.initial_adapter, request.schedule.seed
        self.triplets = Triplets(trainer.model, request.start, start.lambda_value, start.factors, seed)
        sharded = uses_deepspeed(trainer.args) or getattr(trainer, "is_fsdp_enabled", False)
        if not sharded:  # which may hold the factors in pieces
            self.triplets.share_weights(trainer.model)
        self.triplets.mask(self.state.first_masks())
        self.set_strength()

    def _first_state(self) -> RankSearchState:
        start = self.request.start
        adapted = replace(start, modules=start.active)  # a given plan may leave modules out
        return RankSearchState(adapted, self.request.config)

    def begin_again(self) -> None:
        """Set adapter, masks, decisions and statistics to what they were before the first step."""
        config = self.request.config
        self.request = replace(self.request, method=make_method(config.method, config.options))
        self.state = self._first_state()
        self.triplets.draw()
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
