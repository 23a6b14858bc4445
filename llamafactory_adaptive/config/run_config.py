"""The validated configuration of a run. Standard library only."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llamafactory_adaptive.ranks.schedule import PruningConfig, ReallocationConfig


_SEARCHES: dict[str, type[PruningConfig] | type[ReallocationConfig]] = {
    "prune": PruningConfig,
    "reallocate": ReallocationConfig,
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

    ``search`` tells how ranks change while training; None where they are fixed before.
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
    search: PruningConfig | ReallocationConfig | None = None
    max_nonfinite_steps: int = 3

    @classmethod
    def from_checked(
        cls,
        common: Mapping[str, Any],
        method: str,
        options: Mapping[str, Any],
        budget: tuple[int, float, int],
        calibration: CalibrationConfig,
        search: PruningConfig | ReallocationConfig | None = None,
    ) -> "AdaptiveConfig":
        """Build the configuration from checked values.

        Args:
            common: the keys that hold for every method, defaults filled in.
            method: the method's registered name.
            options: every option of the method.
            budget: ``lora_rank``, ``lora_alpha`` and the largest rank of a module.
            calibration: which samples are scored.
            search: how ranks change while training; None where they are fixed before.
        """
        lora_rank, lora_alpha, max_rank = budget
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
        parts["search"] = _SEARCHES[strategy](**parts["search"]) if strategy else None
        return cls(**parts)

    @property
    def scale(self) -> float:
        """Return the LoRA scale alpha/r, the same for every module."""
        return self.lora_alpha / self.lora_rank
