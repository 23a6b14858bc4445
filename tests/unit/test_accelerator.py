"""Floats, random states and clocks by the kind of device; devices that are not there are played."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive import accelerator
from llamafactory_adaptive.accelerator import Stopwatch, bytes_held, random_state_kept, widest_float


def test_sums_are_in_fp64_where_the_device_has_it():
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64
    assert widest_float(torch.device("mps")) == torch.float32


def test_random_states_of_the_host_are_kept():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with random_state_kept(torch.device("cpu")):
        torch.rand(7)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_random_states_of_every_accelerator_are_kept(kind, monkeypatch):
    states = {0: torch.tensor([1]), 1: torch.tensor([2])}
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: len(states))
    monkeypatch.setattr(getattr(torch, kind), "get_rng_state", lambda device: states[device].clone())
    monkeypatch.setattr(getattr(torch, kind), "set_rng_state", lambda state, device: states.update({device: state}))
    with random_state_kept(torch.device(kind)):
        states.update({0: torch.tensor([8]), 1: torch.tensor([9])})
    assert states == {0: torch.tensor([1]), 1: torch.tensor([2])}


def test_the_host_times_work_of_its_own(monkeypatch):
    ticks = iter([1.0, 3.5, 10.0, 11.0])
    monkeypatch.setattr(accelerator.time, "perf_counter", lambda: next(ticks))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            pass
    assert watch.take() == 3.5
    assert watch.take() == 0.0


def test_a_device_without_timed_events_is_waited_for(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    with Stopwatch(torch.device("mps")).running():
        assert len(waits) == 1
    assert len(waits) == 2


def test_a_device_with_timed_events_is_not_waited_for(monkeypatch):
    """Its own seconds, counted once the work has ended."""
    done, made = set(), []

    def event(device, enable_timing):
        made.append(SimpleNamespace(record=lambda: None, number=len(made)))
        this = made[-1]
        this.query = lambda: this.number in done
        this.elapsed_time = lambda other: 250.0 * (other.number - this.number)
        return this

    monkeypatch.setattr(torch, "Event", event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: pytest.fail("the host waits"))
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        with watch.running():
            pass
    assert watch.take() == 0.0
    done.add(1)
    assert watch.take() == 0.25
    done.add(3)
    assert watch.take() == 0.25
    assert watch.take() == 0.0


def test_bytes_are_told_by_where_tensors_are():
    here = [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)]
    assert bytes_held(here) == {"host": 16}
    assert bytes_held([*here, torch.zeros(5, device="meta")]) == {"host": 16, "device": 20}
    assert bytes_held([]) == {}


PEAK_OF_CHILD = """
import subprocess, sys
large = bytes(bytearray(b"x") * 2**30)
child = "from llamafactory_adaptive.accelerator import peak_memory; print(peak_memory()['host'])"
subprocess.run([sys.executable, "-c", child], check=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems tell no better")
def test_a_process_does_not_count_the_memory_of_the_one_that_started_it():
    said = subprocess.run([sys.executable, "-c", PEAK_OF_CHILD], check=True, capture_output=True, text=True).stdout
    assert 2**26 < int(said) < 2**30
