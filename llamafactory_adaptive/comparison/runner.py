"""The loop of a comparison: what is due is run, one process per device, until nothing is; each end is written down."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from llamafactory_adaptive.comparison.experiment import Progress, Run
from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.errors import AdaptiveError, DivergedError, OtherProcessError, OutputError
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
        end_runs: ends the runs that are under way.
    """

    def __init__(
        self,
        progress: Progress,
        ledger: Ledger,
        train: Train,
        settings: Callable[[Run], Mapping[str, Any]],
        devices: Sequence[str | None] = (None,),
        end_runs: Callable[[], None] = lambda: None,
    ) -> None:
        self.progress, self.ledger, self.train, self.settings = progress, ledger, train, settings
        self.free, self.end_runs = list(devices), end_runs
        self.running: dict[Future[Any], tuple[Run, str | None]] = {}
        self.seconds: list[float] = []  # of the runs that this process has made

    def run(self) -> None:
        """Make all runs that are due, until none is. Whatever ends this ends the runs that are under way, too.

        Raises:
            DivergedError: plain LoRA, which all others are compared with, diverges at every rate.
            AdaptiveError: plain LoRA cannot be run; the disk is full; a device is lost.
        """
        pool = ThreadPoolExecutor(len(self.free))
        try:
            self._loop(pool)
        except BaseException:  # Ctrl-C among them: the threads would otherwise wait for hours
            self.end_runs()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _loop(self, pool: ThreadPoolExecutor) -> None:
        while True:
            self._check()
            self._start(pool)
            if not self.running:
                return
            done, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in done:
                self._finish(future)

    def _check(self) -> None:
        """Give up arms of another budget, and everything where there is nothing to compare with."""
        for arm, why in self.progress.give_up_larger_arms().items():
            tell(f"{arm} is given up: {why}")
        plain = self.progress.arms[0].name
        choice = self.progress.choice_if_known(plain)
        if choice is not None and choice.best is None:
            raise DivergedError(
                f"{plain} diverged at every point tried ({', '.join(map(str, choice.curve))}), so that there is "
                "nothing to compare with: give lower --rates, or a YAML with warmup_ratio or max_grad_norm"
            )

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
        except (OutputError, OtherProcessError):  # the disk or the device: no other run would fare better
            raise
        except AdaptiveError as error:
            if run.arm == self.progress.arms[0].name:
                raise
            self.progress.failed[run.arm] = str(error)
            said = f"{run.arm} is given up: {error}"
        left = self.progress.runs_left()
        tell(f"{said}; {left} to go{self._time_left(left)}")

    def _words(self, run: Run, outcome: Mapping[str, Any]) -> str:
        what = f"{run.arm} at {run.point}, seed {run.seed}"
        if outcome["status"] == "diverged":
            return f"{what}: diverged"
        return f"{what}: loss {self.progress.figure(outcome, 'dev'):.4f} on the rows that choose"

    def _time_left(self, runs: int) -> str:
        if not self.seconds or not runs:
            return ""
        rounds = math.ceil(runs / (len(self.free) + len(self.running)))
        return f", about {hours(rounds * sum(self.seconds) / len(self.seconds))}"


def hours(seconds: float) -> str:
    """Write a length of time as a person says it: 40 seconds, 12 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
