"""Schedules of dynamic methods: the steps of their allocations and the budget of each. Pure: no torch, no I/O."""

from dataclasses import dataclass

from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.ranks.search_config import ExchangeConfig, PruningConfig, ReallocationConfig, SearchConfig


@dataclass(frozen=True)
class _Spaced:
    """Allocations at a regular distance between two steps, the second of which has the last one."""

    begin: int
    end: int
    interval: int

    def due(self, step: int) -> bool:
        """Tell whether an allocation is due after ``step`` optimizer steps."""
        return step == self.end or (self.begin < step < self.end and step % self.interval == 0)

    def is_final(self, step: int) -> bool:
        """Tell whether the ranks are final after ``step`` optimizer steps."""
        return step >= self.end


@dataclass(frozen=True)
class Schedule(_Spaced):
    """Cubic decay of the budget over optimizer steps (AdaLoRA, Eq. 12; IGU-LoRA uses the same).

    ``b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (t_f - t_i))^3`` for ``t_i < t < t_f``; ``b_0`` before, ``b_T`` after.

    Attributes:
        begin: t_i, the last step at the full start budget.
        end: t_f, the step after which the ranks are final.
        interval: optimizer steps between allocations.
        start_budget, target_budget: b_0 and b_T, in budget units.
        interval_epochs: the share of an epoch that ``interval`` was computed from, if any.
    """

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

    def describe(self, kind: str) -> str:
        """Describe the schedule in words; ``kind`` names what the budget counts."""
        return f"{self.start_budget:,} {kind}, pruned to {self.target_budget:,} {_when(self)}"


@dataclass(frozen=True)
class Exchanges(_Spaced):
    """A constant budget under which ranks are exchanged between modules (ElaLoRA).

    Attributes:
        begin: the last step of the warm-up.
        end: the step after which the ranks are final.
        interval: optimizer steps between exchanges.
        target_budget: the budget, in budget units.
        interval_epochs: the share of an epoch that ``interval`` was computed from, if any.
    """

    target_budget: int
    interval_epochs: float | None = None

    def budget(self, step: int) -> int:
        """Return the budget, which is the same after every step, in budget units."""
        return self.target_budget

    def progress(self, step: int) -> float:
        """Return how much of the time of exchanges is over after ``step`` optimizer steps, from 0 to 1."""
        return min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))

    def describe(self, kind: str) -> str:
        """Describe the exchanges in words; ``kind`` names what the budget counts."""
        return f"{self.target_budget:,} {kind}, exchanged {_when(self)}"


def spacing(schedule: Schedule | Exchanges) -> str:
    """Describe the distance of allocations."""
    steps = "every step" if schedule.interval == 1 else f"every {schedule.interval} steps"
    return steps if schedule.interval_epochs is None else f"{steps} ({schedule.interval_epochs:g} of an epoch)"


def _when(schedule: Schedule | Exchanges) -> str:
    return f"{spacing(schedule)} between steps {schedule.begin} and {schedule.end}"


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


AnySchedule = Schedule | Exchanges | Refreshes | SingleCut
_FEWEST = {"spaced": 5, "shares": 2}


def short_run_warning(schedule: AnySchedule, total_steps: int) -> str | None:
    """Return a warning, with a remedy, if the run is too short for its schedule; None if it has enough allocations."""
    if isinstance(schedule, SingleCut):
        return None
    count = sum(schedule.due(step) for step in range(1, min(schedule.end, total_steps) + 1))
    if isinstance(schedule, Exchanges):
        count -= schedule.due(schedule.end)  # which ends the search and exchanges nothing
    spaced = isinstance(schedule, _Spaced)
    if count >= _FEWEST["spaced" if spaced else "shares"]:
        return None
    begin = schedule.begin if isinstance(schedule, _Spaced) else 0
    remedy = "train more steps (max_steps, num_train_epochs)"
    if isinstance(schedule, Schedule) and (steps := (schedule.end - begin) // (2 * _FEWEST["spaced"])):
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


def interval_steps(search: PruningConfig | ExchangeConfig, epoch_steps: int | None) -> int:
    """Return the optimizer steps between two allocations, at least 1.

    Args:
        search: settings of the method.
        epoch_steps: optimizer steps of an epoch; None where the training data has no length.

    Raises:
        AdaptiveConfigError: the distance is a share of an epoch, and the training data has no length.
    """
    if search.interval is not None:
        return search.interval
    assert search.interval_epochs is not None
    if epoch_steps is None:
        reason = "the training data has no known length, so the steps of an epoch are not known"
        refuse("adaptive_interval_epochs", search.interval_epochs, reason, "adaptive_interval: 10")
    return max(1, round(search.interval_epochs * epoch_steps))


def refresh_interval(ratio: float, total_steps: int) -> int:
    """Return the number of optimizer steps between two refreshes; ``ratio`` is that share of all steps."""
    return max(1, round(ratio * total_steps))


def make_schedule(
    search: SearchConfig,
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
    begin = min(int(search.warmup_ratio * total_steps), total_steps - 1)
    end = max(begin + 1, total_steps - round(search.final_ratio * total_steps))
    if isinstance(search, ExchangeConfig):
        return Exchanges(begin, end, interval_steps(search, epoch_steps), target_budget, search.interval_epochs)
    if search.cuts_once:
        return SingleCut(end, start_budget, target_budget)
    interval = interval_steps(search, epoch_steps)
    return Schedule(begin, end, interval, start_budget, target_budget, search.interval_epochs)
