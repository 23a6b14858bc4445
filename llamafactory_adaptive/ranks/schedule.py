"""When a dynamic method allocates, and under which budget. Pure: no torch, no input or output."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PruningConfig:
    """How a dynamic method goes from its over-ranked start to the budget. Ratios are of all optimizer steps."""

    init_rank: int
    warmup_ratio: float
    final_ratio: float
    interval: int
    max_overhead: float | None
    seed: int

    @property
    def live_rank(self) -> int:
        """Rank of the tensors that train."""
        return self.init_rank


@dataclass(frozen=True)
class ReallocationConfig:
    """How a dynamic method moves ranks about under a constant budget.

    Attributes:
        live_rank: rank of the tensors that train: what a module can grow to.
        refresh_ratio: share of all optimizer steps between two allocations.
        beta: what the sensitivities of earlier intervals count, compared with those of the next.
        seed: of the factors.
    """

    live_rank: int
    refresh_ratio: float
    beta: float
    seed: int

    @property
    def max_overhead(self) -> None:
        """Limit on extra passes: none can be set for a method that reallocates."""


@dataclass(frozen=True)
class Schedule:
    """Budget over optimizer steps (AdaLoRA, Eq. 12; IGU-LoRA uses the same).

    ``b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (t_f - t_i))^3`` for ``t_i < t < t_f``; ``b_0`` before, ``b_T`` after.

    Attributes:
        begin: t_i, the last step with everything on.
        end: t_f, the step after which the ranks are final.
        interval: optimizer steps between allocations.
        start_budget, target_budget: b_0 and b_T, in budget units.
    """

    begin: int
    end: int
    interval: int
    start_budget: int
    target_budget: int

    def budget(self, step: int) -> int:
        """Budget units allowed after ``step`` optimizer steps, rounded down."""
        if step <= self.begin:
            return self.start_budget
        if step >= self.end:
            return self.target_budget
        # Whole numbers throughout: a float could round the same step differently on another machine.
        width, left = self.end - self.begin, self.end - step
        return self.target_budget + (self.start_budget - self.target_budget) * left**3 // width**3

    def due(self, step: int) -> bool:
        """Whether an allocation follows after ``step`` optimizer steps."""
        return step == self.end or (self.begin < step < self.end and step % self.interval == 0)

    def is_final(self, step: int) -> bool:
        """Whether the ranks no longer change after ``step`` optimizer steps."""
        return step >= self.end

    def describe(self, kind: str) -> str:
        """In words; ``kind`` is what the budget counts."""
        return (
            f"{self.start_budget:,} {kind}, pruned to {self.target_budget:,} between steps {self.begin} and {self.end}"
        )


@dataclass(frozen=True)
class Refreshes:
    """A constant budget that is shared anew every so often (TsqLoRA).

    Attributes:
        interval: optimizer steps between allocations.
        end: step of the last one; after it ranks are final.
        target_budget: in budget units.
    """

    interval: int
    end: int
    target_budget: int

    def budget(self, step: int) -> int:
        """The same at every step."""
        return self.target_budget

    def due(self, step: int) -> bool:
        """Whether an allocation follows after ``step`` optimizer steps."""
        return 0 < step <= self.end and step % self.interval == 0

    def is_final(self, step: int) -> bool:
        """Whether the ranks no longer change after ``step`` optimizer steps."""
        return step >= self.end

    def describe(self, kind: str) -> str:
        """In words; ``kind`` is what the budget counts."""
        return f"{self.target_budget:,} {kind}, shared anew every {self.interval} steps up to step {self.end}"


_FEWEST = {"prunes": 5, "shares": 2}


def short_run_warning(schedule: Schedule | Refreshes, total_steps: int) -> str | None:
    """Warn of a run too short for its schedule, with what to change; None when there are allocations enough."""
    count = sum(schedule.due(step) for step in range(1, min(schedule.end, total_steps) + 1))
    prunes = isinstance(schedule, Schedule)
    if count >= _FEWEST["prunes" if prunes else "shares"]:
        return None
    begin = schedule.begin if isinstance(schedule, Schedule) else 0
    remedy = "train more steps (max_steps, num_train_epochs)"
    if prunes and (width := schedule.end - begin) >= 2 * _FEWEST["prunes"]:
        remedy += f", or set adaptive_interval: {width // (2 * _FEWEST['prunes'])}"
    return (
        f"ranks are chosen {'only once' if count == 1 else f'only {count} times'} between steps {begin} and "
        f"{schedule.end} of {total_steps}, after little was seen of the components; {remedy}"
    )


def refresh_interval(ratio: float, total_steps: int) -> int:
    """Optimizer steps from one refresh to the next."""
    return max(1, round(ratio * total_steps))


def make_schedule(
    search: PruningConfig | ReallocationConfig, total_steps: int, start_budget: int, target_budget: int
) -> Schedule | Refreshes:
    """Turn ratios into steps. Even one step leaves room for one observation before the final allocation."""
    if isinstance(search, ReallocationConfig):
        interval = refresh_interval(search.refresh_ratio, total_steps)
        # None after the very last step: what grows then would never train.
        return Refreshes(interval, max(interval, (total_steps - 1) // interval * interval), target_budget)
    pruning = search
    begin = min(int(pruning.warmup_ratio * total_steps), total_steps - 1)
    end = max(begin + 1, total_steps - round(pruning.final_ratio * total_steps))
    return Schedule(begin, end, pruning.interval, start_budget, target_budget)
