"""Schedules of dynamic methods: the steps of their allocations and the budget of each. Pure: no torch, no I/O."""

from dataclasses import dataclass
from typing import Literal, get_args

from llamafactory_adaptive.errors import refuse


# How a method changes ranks while training.
Strategy = Literal["prune", "reallocate", "fixed"]
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
class GivenRanksConfig:
    """Settings of a method that trains given ranks in the form ``P diag(lambda) Q``; the ranks never change.

    Attributes:
        seed: seed of the factors' initial values.
    """

    seed: int

    @property
    def max_overhead(self) -> None:
        """Return None: there are no extra passes to limit."""


@dataclass(frozen=True)
class Schedule:
    """Cubic decay of the budget over optimizer steps (AdaLoRA, Eq. 12; IGU-LoRA uses the same).

    ``b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (t_f - t_i))^3`` for ``t_i < t < t_f``; ``b_0`` before, ``b_T`` after.

    Attributes:
        begin: t_i, the last step at the full start budget.
        end: t_f, the step after which the ranks are final.
        interval: optimizer steps between allocations.
        start_budget, target_budget: b_0 and b_T, in budget units.
        interval_epochs: the share of an epoch that ``interval`` was computed from, if any.
    """

    begin: int
    end: int
    interval: int
    start_budget: int
    target_budget: int
    interval_epochs: float | None = None

    def budget(self, step: int) -> int:
        """Return the budget after ``step`` optimizer steps, in budget units, rounded down."""
        if step <= self.begin:
            return self.start_budget
        if step >= self.end:
            return self.target_budget
        # Whole numbers throughout: a float could round the same step differently on another machine.
        width, left = self.end - self.begin, self.end - step
        return self.target_budget + (self.start_budget - self.target_budget) * left**3 // width**3

    def due(self, step: int) -> bool:
        """Tell whether an allocation is due after ``step`` optimizer steps."""
        return step == self.end or (self.begin < step < self.end and step % self.interval == 0)

    def is_final(self, step: int) -> bool:
        """Tell whether the ranks are final after ``step`` optimizer steps."""
        return step >= self.end

    @property
    def spacing(self) -> str:
        """Return the distance of allocations in words."""
        steps = "every step" if self.interval == 1 else f"every {self.interval} steps"
        return steps if self.interval_epochs is None else f"{steps} ({self.interval_epochs:g} of an epoch)"

    def describe(self, kind: str) -> str:
        """Describe the schedule in words; ``kind`` names what the budget counts."""
        budgets = f"{self.start_budget:,} {kind}, pruned to {self.target_budget:,}"
        return f"{budgets} {self.spacing} between steps {self.begin} and {self.end}"


@dataclass(frozen=True)
class Refreshes:
    """A constant budget that is divided among the modules anew at regular intervals (TsqLoRA).

    Attributes:
        interval: optimizer steps between allocations.
        end: step of the last allocation; after it the ranks are final.
        target_budget: the budget, in budget units.
    """

    interval: int
    end: int
    target_budget: int

    def budget(self, step: int) -> int:
        """Return the budget, which is the same after every step, in budget units."""
        return self.target_budget

    def due(self, step: int) -> bool:
        """Tell whether an allocation is due after ``step`` optimizer steps."""
        return 0 < step <= self.end and step % self.interval == 0

    def is_final(self, step: int) -> bool:
        """Tell whether the ranks are final after ``step`` optimizer steps."""
        return step >= self.end

    def describe(self, kind: str) -> str:
        """Describe the refreshes in words; ``kind`` names what the budget counts."""
        return f"{self.target_budget:,} {kind}, shared anew every {self.interval} steps up to step {self.end}"


@dataclass(frozen=True)
class SingleCut:
    """A budget that falls at once, where an over-ranked adapter is cut.

    Attributes:
        end: step after which the ranks are final.
        start_budget, target_budget: budget before and after, in budget units.
    """

    end: int
    start_budget: int
    target_budget: int

    @property
    def interval(self) -> int:
        """Return the steps before the only allocation."""
        return self.end

    def budget(self, step: int) -> int:
        """Return the budget after ``step`` optimizer steps, in budget units."""
        return self.target_budget if self.is_final(step) else self.start_budget

    def due(self, step: int) -> bool:
        """Tell whether an allocation is due after ``step`` optimizer steps."""
        return step == self.end

    def is_final(self, step: int) -> bool:
        """Tell whether the ranks are final after ``step`` optimizer steps."""
        return step >= self.end

    def describe(self, kind: str) -> str:
        """Describe the cut in words; ``kind`` names what the budget counts."""
        return f"{self.start_budget:,} {kind}, cut to {self.target_budget:,} at step {self.end}"


AnySchedule = Schedule | Refreshes | SingleCut
_FEWEST = {"prunes": 5, "shares": 2}


def short_run_warning(schedule: AnySchedule, total_steps: int) -> str | None:
    """Return a warning, with a remedy, if the run is too short for its schedule; None if it has enough allocations."""
    if isinstance(schedule, SingleCut):
        return None
    count = sum(schedule.due(step) for step in range(1, min(schedule.end, total_steps) + 1))
    prunes = isinstance(schedule, Schedule)
    if count >= _FEWEST["prunes" if prunes else "shares"]:
        return None
    begin = schedule.begin if isinstance(schedule, Schedule) else 0
    remedy = "train more steps (max_steps, num_train_epochs)"
    if isinstance(schedule, Schedule) and (steps := (schedule.end - begin) // (2 * _FEWEST["prunes"])):
        remedy += f", or set {_interval_setting(schedule, steps)}"
    return (
        f"ranks are chosen {'only once' if count == 1 else f'only {count} times'} between steps {begin} and "
        f"{schedule.end} of {total_steps}, after little was seen of the components; {remedy}"
    )


def _interval_setting(schedule: Schedule, steps: int) -> str:
    """Write the setting that would space allocations by ``steps``, with the key that the run uses."""
    if schedule.interval_epochs is None:
        return f"adaptive_interval: {steps}"
    return f"adaptive_interval_epochs: {schedule.interval_epochs * steps / schedule.interval:.2g}"


def interval_steps(pruning: PruningConfig, epoch_steps: int | None) -> int:
    """Return the optimizer steps between two allocations, at least 1.

    Args:
        pruning: settings of the method.
        epoch_steps: optimizer steps of an epoch; None where the training data has no length.

    Raises:
        AdaptiveConfigError: the distance is a share of an epoch, and the training data has no length.
    """
    if pruning.interval is not None:
        return pruning.interval
    assert pruning.interval_epochs is not None
    if epoch_steps is None:
        reason = "the training data has no known length, so the steps of an epoch are not known"
        refuse("adaptive_interval_epochs", pruning.interval_epochs, reason, "adaptive_interval: 10")
    return max(1, round(pruning.interval_epochs * epoch_steps))


def refresh_interval(ratio: float, total_steps: int) -> int:
    """Return the number of optimizer steps between two refreshes; ``ratio`` is that share of all steps."""
    return max(1, round(ratio * total_steps))


def make_schedule(
    search: PruningConfig | ReallocationConfig,
    total_steps: int,
    start_budget: int,
    target_budget: int,
    epoch_steps: int | None = None,
) -> AnySchedule:
    """Build the schedule of a run of ``total_steps`` by turning ratios into step numbers.

    Even in a run of one step the final allocation comes after one observation.

    Args:
        search: settings by which ranks change.
        total_steps: optimizer steps of the run.
        start_budget: budget before the first allocation, in budget units.
        target_budget: budget after the last allocation.
        epoch_steps: optimizer steps of an epoch, for distances given as a share of it; None if not known.

    Raises:
        AdaptiveConfigError: the distance of allocations is a share of an epoch, whose steps are not known.
    """
    if isinstance(search, ReallocationConfig):
        interval = refresh_interval(search.refresh_ratio, total_steps)
        # None after the very last step: what grows then would never train.
        return Refreshes(interval, max(interval, (total_steps - 1) // interval * interval), target_budget)
    pruning = search
    begin = min(int(pruning.warmup_ratio * total_steps), total_steps - 1)
    end = max(begin + 1, total_steps - round(pruning.final_ratio * total_steps))
    if pruning.cuts_once:
        return SingleCut(end, start_budget, target_budget)
    interval = interval_steps(pruning, epoch_steps)
    return Schedule(begin, end, interval, start_budget, target_budget, pruning.interval_epochs)
