"""The random state of a process: of Python, NumPy, torch and every accelerator."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """What all generators of this process would draw next.

    Attributes:
        python, numpy: as their libraries return it.
        cpu: of torch on the CPU.
        accelerators: of torch on each accelerator.
    """

    python: Any
    numpy: Any
    cpu: Tensor
    accelerators: tuple[Tensor, ...]

    @classmethod
    def current(cls) -> "RandomState":
        """Read the state of all generators."""
        accelerators = tuple(_device_module().get_rng_state(number) for number in range(_devices()))
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), accelerators)

    def restore(self) -> None:
        """Set all generators back to this state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for number, state in enumerate(self.accelerators):
            _device_module().set_rng_state(state, number)

    def is_current(self) -> bool:
        """Tell whether nothing has been drawn since."""
        now = RandomState.current()
        tensors = zip((self.cpu, *self.accelerators), (now.cpu, *now.accelerators), strict=True)
        numpy = all(np.array_equal(mine, theirs) for mine, theirs in zip(self.numpy, now.numpy, strict=True))
        return self.python == now.python and numpy and all(torch.equal(mine, theirs) for mine, theirs in tensors)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Set all generators back, after the context, to what they were before."""
    before = RandomState.current()
    try:
        yield
    finally:
        before.restore()


def _devices() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _device_module() -> Any:
    return torch.get_device_module(torch.accelerator.current_accelerator())
