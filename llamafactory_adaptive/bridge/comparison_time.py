"""How long a comparison takes, told before it starts: by short runs of plain LoRA and of the arms that score first."""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from llamafactory_adaptive.bridge.arguments import Args
from llamafactory_adaptive.bridge.comparison_checks import measured_before_training
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.comparison.runner import hours
from llamafactory_adaptive.errors import CalibrationError


class Timed(Protocol):
    """What is asked of a comparison: its design, the settings of its runs, and short runs."""

    design: Design

    def settings(self, run: Run) -> Args:
        """Build the settings of a run."""

    def seconds_of_a_run(self, device: str | None, arm: str = ...) -> float | None:
        """Estimate the seconds of one whole run; None where a short one diverged."""


def estimate(comparison: Timed, progress: Progress, devices: Sequence[str | None]) -> str:
    """Describe how long the runs that are left take.

    Every run is taken to last as long as one of plain LoRA. What is measured before training comes on top, once for
    each seed, as scores are kept for the other rates; arms that measure the same share them, too.
    """
    plain = comparison.seconds_of_a_run(devices[0])
    if plain is None:
        return ", of a length that a trial did not tell, as it diverged"
    scoring = sum(_scoring(comparison, progress, devices[0], plain)) / len(devices)
    total = plain * math.ceil(progress.runs_left() / len(devices)) + scoring
    where = f" on {len(devices)} devices" if len(devices) > 1 else ""
    share = f", {hours(scoring)} of it for scores before training" if scoring else ""
    return f", about {hours(total)}{where}{share} (arms that find ranks while they train take longer)"


def _scoring(comparison: Timed, progress: Progress, device: str | None, plain: float) -> Iterator[float]:
    """Measure what each arm that scores first adds to a run, over all of its seeds that are left."""
    known = set()
    for arm in (arm.name for arm in progress.arms if progress.runs_left_of(arm.name)):
        settings = comparison.settings(comparison.design.final(arm, comparison.design.grid[0])[0])
        measured = measured_before_training(settings)
        if measured is None or measured in known:
            continue
        known.add(measured)
        try:
            seconds = comparison.seconds_of_a_run(device, arm)
        except CalibrationError:  # the arm will be given up, which is told then
            continue
        more = 0.0 if seconds is None else max(0.0, seconds - plain)
        yield more * min(progress.runs_left_of(arm), comparison.design.all_seeds)
