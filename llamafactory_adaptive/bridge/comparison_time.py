"""How long a comparison takes, told before it starts: by short runs of plain LoRA and of the arms that score first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llamafactory_adaptive.bridge.arguments import Args
from llamafactory_adaptive.bridge.comparison_checks import measured_before_training
from llamafactory_adaptive.comparison.device_loop import hours, makespan
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.errors import CalibrationError


@dataclass(frozen=True)
class RunTime:
    """How long a run takes, by a short one: seconds of each step, and of all that is done once."""

    once: float
    step: float

    def seconds(self, steps: int) -> float:
        """Estimate the seconds of a run of so many steps."""
        return self.once + steps * self.step


class Timed(Protocol):
    """What is asked of a comparison: its design, the settings and the steps of its runs, and short runs."""

    design: Design

    def settings(self, run: Run) -> Args:
        """Build the settings of a run."""

    def steps(self, run: Run | None = None) -> int:
        """Estimate the steps of a run; of a whole one without."""

    def run_time(self, device: str | None, arm: str = ...) -> RunTime | None:
        """Measure a short run; None where it diverged."""


def estimate(comparison: Timed, plain: RunTime | None, progress: Progress, devices: Sequence[str | None]) -> str:
    """Describe how long the runs that are left take.

    Every run is taken to last as long as one of plain LoRA with as many steps. What is measured before training comes
    on top, once for each seed, as scores are kept for the other rates; arms that measure the same share them, too.

    Args:
        comparison: the comparison.
        plain: how long plain LoRA takes; None where that is not known.
        progress: knows the runs that are left.
        devices: the devices.
    """
    if plain is None:
        return ", of a length that a trial did not tell, as it diverged"
    scoring = sum(_scoring(comparison, progress, devices[0], plain)) / len(devices)
    total = makespan((plain.seconds(comparison.steps(run)) for run in progress.left()), len(devices)) + scoring
    where = f" on {len(devices)} devices" if len(devices) > 1 else ""
    share = f", {hours(scoring)} of it for scores before training" if scoring else ""
    return f", about {hours(total)}{where}{share} (arms that find ranks while they train take longer)"


def _scoring(comparison: Timed, progress: Progress, device: str | None, plain: RunTime) -> Iterator[float]:
    """Measure what each arm that scores first adds to a run, over all of its seeds that are left."""
    known = set[str]()
    for arm in (arm.name for arm in progress.arms if progress.left_of(arm.name)):
        settings = comparison.settings(comparison.design.final(arm, comparison.design.grid[0])[0])
        measured = measured_before_training(settings)
        if measured is None or measured in known:
            continue
        known.add(measured)
        try:
            time = comparison.run_time(device, arm)
        except CalibrationError:  # the arm will be given up, which is told then
            continue
        more = 0.0 if time is None else max(0.0, time.once - plain.once)
        yield more * min(len(progress.left_of(arm)), comparison.design.all_seeds)
