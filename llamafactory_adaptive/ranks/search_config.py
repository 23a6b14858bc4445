"""Settings by which a method changes ranks while training, or trains given ones. Standard library only."""

from dataclasses import dataclass
from typing import Literal, get_args


# How a method changes ranks while training.
Strategy = Literal["prune", "reallocate", "exchange", "fixed"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)


@dataclass(frozen=True)
class PruningConfig:
    """Settings of a method that starts above the budget and prunes down to it. Ratios are of all optimizer steps.

    Attributes:
        interval: optimizer steps between two allocations; None where ``interval_epochs`` gives the distance. Where
            that is None too there is one allocation, in the end.
        interval_epochs: the distance as a share of an epoch, whose steps are known once the data is.
    """

    init_rank: int
    warmup_ratio: float
    final_ratio: float
    interval: int | None
    max_overhead: float | None
    seed: int
    interval_epochs: float | None = None

    @property
    def cuts_once(self) -> bool:
        """Tell whether there is no distance between allocations, since there is one alone."""
        return self.interval is None and self.interval_epochs is None

    @property
    def live_rank(self) -> int:
        """Return the rank of the tensors that train."""
        return self.init_rank


@dataclass(frozen=True)
class ReallocationConfig:
    """Settings of a method that moves ranks between modules under a constant budget.

    Attributes:
        live_rank: rank of the tensors that train, and so the largest that a module can grow to.
        refresh_ratio: share of all optimizer steps between two allocations.
        beta: weight of the sensitivities summed so far, relative to those of the next interval.
        seed: seed of the factors' initial values.
    """

    live_rank: int
    refresh_ratio: float
    beta: float
    seed: int

    @property
    def max_overhead(self) -> None:
        """Return None: extra passes of a method that reallocates have no limit."""


@dataclass(frozen=True)
class ExchangeConfig:
    """Settings of a method that exchanges ranks between modules under a constant budget, at regular steps.

    Attributes:
        live_rank: rank of the tensors that train, and so the largest that a module can grow to.
        warmup_ratio, final_ratio: shares of all optimizer steps before the first exchange and after the last one.
        interval: optimizer steps between two exchanges; None where ``interval_epochs`` gives the distance.
        seed: seed of the factors' initial values, and of the directions of new components.
        interval_epochs: the distance as a share of an epoch, whose steps are known once the data is.
    """

    live_rank: int
    warmup_ratio: float
    final_ratio: float
    interval: int | None
    seed: int
    interval_epochs: float | None = None

    @property
    def max_overhead(self) -> None:
        """Return None: there are no extra passes to limit."""


SearchConfig = PruningConfig | ReallocationConfig | ExchangeConfig


@dataclass(frozen=True)
class GivenRanksConfig:
    """Settings of a method that trains given ranks in the form ``P diag(lambda) Q``; the ranks never change.

    Attributes:
        seed: seed of the factors' initial values.
    """

    seed: int

    @property
    def max_overhead(self) -> None:
        """Return None: there are no extra passes to limit."""
