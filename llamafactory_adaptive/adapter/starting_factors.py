"""The factors that a fresh adapter starts from, where they were computed from data before training."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llamafactory_adaptive.adapter.lora import live_factors
from llamafactory_adaptive.engines.distributed import broadcast_from_first, from_main
from llamafactory_adaptive.ranks.first_update import slowdown_of_norms
from llamafactory_adaptive.ranks.plan import ModuleShape


@dataclass(frozen=True)
class StartingFactors:
    """A file with a tensor of each module, whose first r rows are those of rank r.

    Attributes:
        kind: ``eva``, rows of A; ``gora``, rows ``[A, A G^T]``.
        path: safetensors file, one tensor by module name; rank 0 alone reads it.
        gamma: size of the first update with ``gora``.
        copied: digests of the B factors that were copied and are not zero, by module.
    """

    kind: str
    path: Path
    gamma: float
    copied: dict[str, str] = field(default_factory=dict, compare=False)

    @torch.no_grad()
    def copy_into(self, model: nn.Module, scale: float, device: torch.device | str = "cpu") -> list[float]:
        """Copy the start into a live adapter that has not been trained.

        Rank 0 reads the file, and the other processes get the factors from its model: nodes may share no folder.

        Args:
            model: model with whole, unwrapped factors.
            scale: alpha/r, the same for all modules.
            device: where the training's process group sends tensors from; the model may not be there yet.

        Returns:
            For each module how many times smaller its first AdamW update is than plain LoRA's.
        """
        factors, slowdowns = {name: (_weight(a), _weight(b)) for name, (a, b) in live_factors(model).items()}, []
        from_main("the start of the factors", lambda: self._read_into(factors, scale))
        for name, (a, b) in factors.items():
            a.copy_(broadcast_from_first(a.to(device)))
            if self.kind == "gora":
                b.copy_(broadcast_from_first(b.to(device)))
                self.copied[name] = _digest(b)
            p, q = (float(factor.float().norm()) / math.sqrt(len(a)) for factor in (b, a))
            slowdowns.append(slowdown_of_norms(p, q, ModuleShape(name, a.shape[1], len(b))))
        return slowdowns

    def _read_into(self, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
        with safe_open(self.path, framework="pt") as file:
            for name, (a, b) in factors.items():
                r, d_in = a.shape
                rows = file.get_tensor(name)[:r]
                a.copy_(rows[:, :d_in])
                if self.kind == "gora":
                    b.copy_(compressed_gradient(rows, d_in, scale, self.gamma))

    def is_start(self, name: str, b: Tensor) -> bool:
        """Tell whether B (d_out, r) of a module is still what it started from; the file is not needed for it."""
        return self.copied[name] == _digest(b) if self.kind == "gora" else not bool(b.any())


def _weight(factor: nn.Module) -> Tensor:
    return cast(Tensor, factor.weight).detach()


def _digest(b: Tensor) -> str:
    return hashlib.sha256(b.detach().float().cpu().numpy().tobytes()).hexdigest()


def compressed_gradient(rows: Tensor, d_in: int, scale: float, gamma: float) -> Tensor:
    """Compute GoRA's B (d_out, r) from A and ``A G^T``.

    ``G A^T (A A^T)^-1`` is the B whose product with A comes closest to G. For a gradient without preferred directions
    that product has ``sqrt(r / d_in)`` of the norm of G, so that with

        B = - xi G A^T (A A^T)^-1,    xi = gamma sqrt(d_in / r) / scale

    the first update, ``scale * B A``, is as large as that of a step of gradient descent at the rate gamma. With the
    paper's scale, alpha / sqrt(r), this is its ``xi = gamma sqrt(d_in) / alpha``.

    Args:
        rows: ``[A, A G^T]``, (r, d_in + d_out).
        d_in: number of inputs.
        scale: alpha/r.
        gamma: the rate of that step.
    """
    a, projected = rows[:, :d_in].double(), rows[:, d_in:].double()
    xi = gamma * math.sqrt(d_in / len(rows)) / scale
    best: Tensor = torch.linalg.solve(a @ a.T, projected).T
    return -xi * best
