"""The loop of a comparison: what is due is run, one process per device, until nothing is; each end is written down."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from llamafactory_adaptive.comparison.experiment import Progress, Run
from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.reports.plaintext import tell


Train = Callable[[Run, str | None], Mapping[str, Any]]


class Runner:
    """Runs what is due on all devices, and tells how far it is.

    Args:
        progress: knows what is due.
        ledger: receives what came of each run.
        train: makes one run on one device; it raises an AdaptiveError where the run cannot be made at all.
        settings: returns everything that a run's result depends on, for the ledger.
        devices: devices as ``CUDA_VISIBLE_DEVICES`` names them; (None,) for the only one.
    """

    def __init__(
        self,
        progress: Progress,
        ledger: Ledger,
        train: Train,
        settings: Callable[[Run], Mapping[str, Any]],
        devices: Sequence[str | None] = (None,),
    ) -> None:
        self.progress, self.ledger, self.train, self.settings = progress, ledger, train, settings
        self.free = list(devices)
        self.running: dict[Future[Any], tuple[Run, str | None]] = {}
        self.seconds: list[float] = []  # of the runs that this process has made

    def run(self) -> None:
        """Make all runs that are due, until none is.

        Raises:
            AdaptiveError: the first run of plain LoRA, which all others are compared with, cannot be made.
        """
        with ThreadPoolExecutor(len(self.free)) as pool:
            while True:
                self._start(pool)
                if not self.running:
                    return
                done, _ = wait(self.running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(future)

    def _start(self, pool: ThreadPoolExecutor) -> None:
        """Put a run that is due on every free device."""
        under_way = {run for run, _ in self.running.values()}
        for run in [run for run in self.progress.due() if run not in under_way][: len(self.free)]:
            device = self.free.pop(0)
            self.running[pool.submit(self._make, run, device)] = run, device

    def _make(self, run: Run, device: str | None) -> Mapping[str, Any]:
        started = time.perf_counter()
        result: Mapping[str, Any] = self.ledger.result(self.settings(run), lambda: self.train(run, device))
        self.seconds.append(time.perf_counter() - started)
        return result

    def _finish(self, future: "Future[Any]") -> None:
        """Tell of a run that has ended, and free its device; an arm whose run cannot be made is given up."""
        run, device = self.running.pop(future)
        self.free.append(device)
        try:
            said = self._words(run, future.result())
        except AdaptiveError as error:
            if run.arm == self.progress.arms[0].name:
                raise
            self.progress.failed[run.arm] = str(error)
            said = f"{run.arm} is given up: {error}"
        left = self.progress.runs_left() + len(self.running)
        tell(f"{said}; {left} to go{self._time_left(left)}")

    def _words(self, run: Run, outcome: Mapping[str, Any]) -> str:
        what = f"{run.arm} at {run.point}, seed {run.seed}"
        if outcome["status"] == "diverged":
            return f"{what}: diverged"
        return f"{what}: loss {self.progress.figure(outcome, 'dev'):.4f} on the rows that choose"

    def _time_left(self, runs: int) -> str:
        if not self.seconds or not runs:
            return ""
        devices = len(self.free) + len(self.running)
        return f", about {hours(runs * sum(self.seconds) / len(self.seconds) / devices)}"


def hours(seconds: float) -> str:
    """Write a length of time as a person says it: 40 seconds, 12 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
