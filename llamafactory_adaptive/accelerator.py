"""What depends on the kind of device: its widest float, its random states, and how its time is measured."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


# Their events tell times without a wait; other accelerators are waited for.
_TIMED = ("cuda", "xpu")


def widest_float(device: torch.device) -> torch.dtype:
    """Return the float type for long sums on a device: fp64, or fp32 where it has no wider one (MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the random states of the host, and of all accelerators if ``device`` is one, at the end of the context.

    ``torch.manual_seed`` seeds all of them, whatever their kind.
    """
    devices = [] if device.type == "cpu" else list(range(torch.accelerator.device_count()))
    with torch.random.fork_rng(devices=devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield


def peak_memory() -> dict[str, int]:
    """Measure the most memory that this process has held so far, in bytes by ``host`` and ``device``.

    Of the host it is what was resident, files that are mapped included; of all devices, what its tensors took. Either
    is left out where the system does not tell it.
    """
    peak = {}
    if (host := _most_resident()) is not None:
        peak["host"] = host
    if torch.cuda.is_available():
        most = sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        if most:
            peak["device"] = most
    return peak


def bytes_held(tensors: Iterable[torch.Tensor]) -> dict[str, int]:
    """Sum up the bytes of tensors by where they are, ``host`` or ``device``."""
    held = {"host": 0, "device": 0}
    for tensor in tensors:
        held["host" if tensor.device.type == "cpu" else "device"] += tensor.nbytes
    return {kind: size for kind, size in held.items() if size}


def _most_resident() -> int | None:
    with suppress(OSError):  # no Linux
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        # Not ru_maxrss, which a process begins with at the peak of the one that started it.
        if found := re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE):
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Stopwatch:
    """Clock of work on a device, which is given out while the device still does it: its seconds, not the host's.

    Args:
        device: device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[float, float] | tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure the work that is given out within the context."""
        if self.device.type in _TIMED:
            begin, end = (torch.Event(device=self.device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._spans.append((begin, end))
            return
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self._spans.append((started, time.perf_counter()))

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def take(self) -> float:
        """Return the seconds of work that has ended and was not returned before; nothing is waited for."""
        ended = [span for span in self._spans if isinstance(span[1], float) or span[1].query()]
        self._spans = [span for span in self._spans if span not in ended]
        return sum(_seconds(*span) for span in ended)


def _seconds(begin: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    return begin.elapsed_time(end) / 1000.0
