"""The loop of a comparison, for runs and evaluations alike: what is due is done, one job per device at a time."""

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Generic, Protocol, TypeVar

from llamafactory_adaptive.comparison.arms import PLAIN
from llamafactory_adaptive.errors import AdaptiveError, OtherProcessError, OutputError
from llamafactory_adaptive.reports.plaintext import tell


class Job(Protocol):
    """What is done at once, on one device; equal to no other job."""

    @property
    def arm(self) -> str:
        """Return the name of its arm."""


AnyJob = TypeVar("AnyJob", bound=Job)


class Work(Protocol[AnyJob]):
    """Jobs, and what becomes of them."""

    @property
    def failed(self) -> dict[str, str]:
        """Return why arms are given up, by name; no job of theirs is due or left."""

    def due(self) -> Sequence[AnyJob]:
        """List the jobs that can be done now, in order; those under way may be among them."""

    def do(self, job: AnyJob, device: str | None) -> Any:
        """Do a job, in a thread of its own; it raises an AdaptiveError where the job cannot be done at all."""

    def words(self, job: AnyJob, result: Any) -> str:
        """Describe what came of a job that has ended, which is no longer due or left."""

    def left(self) -> Sequence[AnyJob]:
        """List the jobs that are left, due or not, those under way among them."""

    def length(self, job: AnyJob) -> float:
        """Estimate how long a job takes against others, in any unit."""

    def words_left(self) -> str:
        """Describe how much is left."""


class DeviceLoop(Generic[AnyJob]):
    """Does jobs on all devices, and tells how far it is.

    Args:
        work: knows the jobs.
        devices: devices as ``CUDA_VISIBLE_DEVICES`` names them; (None,) for the only one.
        end_jobs: ends the jobs that are under way.
    """

    def __init__(self, work: Work[AnyJob], devices: Sequence[str | None], end_jobs: Callable[[], None]) -> None:
        self.work, self.free, self.end_jobs = work, list(devices), end_jobs
        self.running: dict[Future[Any], tuple[AnyJob, str | None]] = {}
        self.seconds = self.lengths = 0.0  # of the jobs that this process has done

    def run(self) -> None:
        """Do all jobs that are due, until none is. Whatever ends this ends the jobs that are under way, too.

        Raises:
            AdaptiveError: plain LoRA fails, which all others are compared with; the disk is full; a device is lost.
        """
        pool = ThreadPoolExecutor(len(self.free))
        try:
            while self._start(pool):
                done, _ = wait(self.running, return_when=FIRST_COMPLETED)
                for future in done:
                    self._finish(future)
        except BaseException:  # Ctrl-C among them: the threads would otherwise wait for hours
            self.end_jobs()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, pool: ThreadPoolExecutor) -> bool:
        """Put a job that is due on every free device, and tell whether any is under way."""
        under_way = [job for job, _ in self.running.values()]
        for job in [job for job in self.work.due() if job not in under_way][: len(self.free)]:
            device = self.free.pop(0)
            self.running[pool.submit(self._timed, job, device)] = job, device
        return bool(self.running)

    def _timed(self, job: AnyJob, device: str | None) -> tuple[Any, float]:
        began = time.perf_counter()
        return self.work.do(job, device), time.perf_counter() - began

    def _finish(self, future: "Future[tuple[Any, float]]") -> None:
        """Tell of a job that has ended, and free its device; an arm whose job cannot be done is given up."""
        job, device = self.running.pop(future)
        self.free.append(device)
        try:
            result, seconds = future.result()
        except (OutputError, OtherProcessError):  # the disk or the device: no other job would fare better
            raise
        except AdaptiveError as error:
            if job.arm == PLAIN:
                raise
            self.work.failed[job.arm] = str(error)
            said = f"{job.arm} is given up: {error}"
        else:
            self.seconds, self.lengths = self.seconds + seconds, self.lengths + self.work.length(job)
            said = self.work.words(job, result)
        tell(f"{said}; {self.work.words_left()}{self._time_left()}")

    def _time_left(self) -> str:
        left = self.work.left()
        if not self.lengths or not left:
            return ""
        lengths = makespan(map(self.work.length, left), len(self.free) + len(self.running))
        return f", about {hours(lengths * self.seconds / self.lengths)}"


def makespan(lengths: Iterable[float], devices: int) -> float:
    """Compute when the last of some jobs ends, each of which begins in turn where a device is free."""
    busy = [0.0] * devices
    for length in lengths:
        heapq.heapreplace(busy, busy[0] + length)
    return max(busy)


def hours(seconds: float) -> str:
    """Write a length of time as a person says it: 40 seconds, 12 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
