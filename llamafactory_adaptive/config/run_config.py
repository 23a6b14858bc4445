"""The validated configuration of a run. Standard library only."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llamafactory_adaptive.config.placement import Placement
from llamafactory_adaptive.ranks.search_config import (
    ExchangeConfig,
    GivenRanksConfig,
    PruningConfig,
    ReallocationConfig,
    SearchConfig,
)


_SEARCHES: dict[str, type[PruningConfig] | type[ReallocationConfig] | type[ExchangeConfig]] = {
    "prune": PruningConfig,
    "reallocate": ReallocationConfig,
    "exchange": ExchangeConfig,
}


@dataclass(frozen=True)
class CalibrationConfig:
    """The samples that a method scores on: data set, number, batch size and the seed of their draw."""

    dataset: str | None
    samples: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class AdaptiveConfig:
    """The checked configuration of one run; its budget is the cost of uniform rank ``lora_rank``, in ``budget_unit``.

    Attributes:
        lora_alpha: alpha that over ``lora_rank`` is the scale.
        search: how ranks change while training; None where they are fixed before.
        asked_alpha: ``lora_alpha`` of the settings, where the method divides it by another rank than ``lora_rank``.
        best_model_from: which evaluations count for the best checkpoint: all of them (``start``), or those with
            ``final`` ranks.
        given: how ranks of ``plan_path`` are trained in the method's own form; None where they are trained as plain
            LoRA.
        granularity: modules that share one score, where scores are made before training: each ``module`` has its own,
            or all of a ``type`` or a ``layer`` have one.
        init: what the factors start from, ``default``, ``eva`` or ``gora``.
        init_gamma: size of the first update with ``gora``.
        placement: the process and the devices that the base is measured on.
    """

    method: str
    options: Mapping[str, Any]
    budget_unit: str
    lora_rank: int
    lora_alpha: float
    min_rank: int
    max_rank: int
    plan_path: str | None
    calibration: CalibrationConfig
    search: SearchConfig | None = None
    max_nonfinite_steps: int = 3
    asked_alpha: float | None = None
    best_model_from: str = "final"
    given: GivenRanksConfig | None = None
    granularity: str = "module"
    init: str = "default"
    init_gamma: float = 0.05
    placement: Placement = field(default_factory=Placement)

    @classmethod
    def from_checked(
        cls,
        common: Mapping[str, Any],
        method: str,
        options: Mapping[str, Any],
        budget: tuple[int, float, int],
        calibration: CalibrationConfig,
        search: SearchConfig | None = None,
        scales_by_start: bool = False,
        given: GivenRanksConfig | None = None,
    ) -> "AdaptiveConfig":
        """Build the configuration from checked values.

        Args:
            common: the keys that hold for every method, defaults filled in.
            method: the method's registered name.
            options: every option of the method.
            budget: ``lora_rank``, ``lora_alpha`` and the largest rank of a module.
            calibration: which samples are scored.
            search: how ranks change while training; None where they are fixed before.
            scales_by_start: whether alpha is divided by the rank at the start, where ranks are pruned.
            given: how given ranks are trained in the method's own form; None for plain LoRA.
        """
        lora_rank, lora_alpha, max_rank = budget
        asked_alpha = None
        if scales_by_start and isinstance(search, PruningConfig):
            asked_alpha, lora_alpha = lora_alpha, lora_alpha * lora_rank / search.init_rank
        return cls(
            method=method,
            options=options,
            budget_unit=common["adaptive_budget_unit"],
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            min_rank=common["adaptive_min_rank"],
            max_rank=max_rank,
            plan_path=common["adaptive_plan"],
            calibration=calibration,
            search=search,
            max_nonfinite_steps=common["adaptive_max_nonfinite_steps"],
            asked_alpha=asked_alpha,
            best_model_from=common["adaptive_best_model_from"],
            given=given,
            granularity=common["adaptive_granularity"],
            init=common["adaptive_init"],
            init_gamma=common["adaptive_init_gamma"],
            placement=Placement.from_checked(common),
        )

    def to_json(self) -> dict[str, Any]:
        """Encode the configuration as a mapping of JSON values."""
        strategy = next((name for name, kind in _SEARCHES.items() if type(self.search) is kind), None)
        return {**asdict(self), "options": dict(self.options), "strategy": strategy}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AdaptiveConfig":
        """Build the configuration from what :meth:`to_json` returned, without validating it again."""
        parts = dict(values)
        strategy = parts.pop("strategy")
        parts["calibration"] = CalibrationConfig(**parts["calibration"])
        parts["placement"] = Placement(**parts["placement"])
        parts["search"] = _SEARCHES[strategy](**parts["search"]) if strategy else None
        parts["given"] = GivenRanksConfig(**parts["given"]) if parts["given"] else None
        return cls(**parts)

    @property
    def scale(self) -> float:
        """Return the LoRA scale alpha/r, the same for every module."""
        return self.lora_alpha / self.lora_rank

    @property
    def weakening(self) -> float:
        """Return how many times smaller the scale is than that of plain LoRA with the same settings."""
        return self.alpha_in_settings / self.lora_alpha

    @property
    def alpha_in_settings(self) -> float:
        """Return alpha as the settings give it."""
        return self.lora_alpha if self.asked_alpha is None else self.asked_alpha
