"""What GoRA starts LoRA from (arXiv 2502.12171): a random A, and its product with the gradient of a base weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamafactory_adaptive.calibration.batches import IGNORE_INDEX, Batch
from llamafactory_adaptive.calibration.measurement import Forward
from llamafactory_adaptive.calibration.weight_gradients import pass_gradients
from llamafactory_adaptive.errors import CalibrationError


@dataclass(frozen=True)
class GradientProjections:
    """Rows of a random A, each with its product with the gradient, ``[A, A G^T]`` of shape (rank, d_in + d_out).

    G (d_out, d_in) is the gradient of the mean loss over all tokens of the calibration rows that take one. It is never
    made: ``A G^T = sum_t (A x_t) g_t^T`` over tokens. The first r rows are those of a smaller rank.

    Attributes:
        rank: number of rows; fewer for modules with fewer inputs.
        seed: seed of A, which is drawn as PEFT draws it (Kaiming uniform with a = sqrt(5)).

    Cost: one forward and backward pass; memory, beyond the pass, that of two LoRA factors of the rank.
    """

    rank: int
    seed: int

    @property
    def key(self) -> str:
        """Return the key of this measurement."""
        return f"gora/rank={self.rank}/seed={self.seed}"

    @property
    def backward(self) -> bool:
        """Return True: gradients are taken."""
        return True

    def __call__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        forward: Forward | None = None,
    ) -> dict[str, Tensor]:
        """Measure the rows of every module, fp32 on the CPU.

        Raises:
            CalibrationError: no gradient reached a module, or no token takes a loss.
        """
        tokens = sum(int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in batches)
        if tokens == 0:
            raise CalibrationError("no calibration token takes a loss, so adaptive_init: gora has no gradient to use")
        rows, sums = self._draw(modules), dict[str, Tensor]()

        def take(name: str, x: Tensor, gradient: Tensor) -> None:
            rows[name] = rows[name].to(x.device)  # modules may lie on several devices
            added = (x.flatten(0, -2) @ rows[name].T).T @ gradient.flatten(0, -2)
            sums[name] = sums[name].add_(added) if name in sums else added

        pass_gradients(model, modules, batches, forward, take)
        return {name: torch.cat([a, sums[name] / tokens], dim=1).cpu() for name, a in rows.items()}

    def _draw(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """Draw A for every module, in their order."""
        generator, drawn = torch.Generator().manual_seed(self.seed), {}
        for name, module in modules.items():
            d_in = int(module.in_features)  # type: ignore[arg-type]
            empty = torch.empty(min(self.rank, d_in), d_in)
            drawn[name] = nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)
        return drawn
