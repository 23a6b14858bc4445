"""The singular value decomposition of an update scale * B A from its factors, without ever building the update.

With the thin QR decompositions B = Q_B R_B and A^T = Q_A R_A it is Q_B (scale R_B R_A^T) Q_A^T, and the core in the
middle is a square of side r. Its decomposition U diag(sigma) V^T gives that of the update,
(Q_B U) diag(sigma) (Q_A V)^T. All is in fp64. Time: O((d_in + d_out) r^2) per module; memory: a few copies of its
factors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FactoredSvd:
    """The components of an update, largest first: ``left @ diag(values) @ right``, in fp64.

    Attributes:
        left: (d_out, k) with orthonormal columns.
        values: (k,) singular values.
        right: (k, d_in) with orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """Return A (rank, d_in) and B (d_out, rank) of the best update of that rank, which is ``scale * B @ A``."""
        root = (self.values[:rank] / scale).sqrt()
        return root[:, None] * self.right[:rank], self.left[:, :rank] * root


def decompose(a: Tensor, b: Tensor, scale: float) -> FactoredSvd:
    """Compute the decomposition of the update ``scale * b @ a`` from a (r, d_in) and b (d_out, r)."""
    left_basis, left_part = torch.linalg.qr(b.double())
    right_basis, right_part = torch.linalg.qr(a.double().T)
    left, values, right = torch.linalg.svd(scale * left_part @ right_part.T, full_matrices=False)
    return FactoredSvd(left_basis @ left, values, right @ right_basis.T)


def singular_values(a: Tensor, b: Tensor, scale: float) -> list[float]:
    """Compute the singular values of ``scale * b @ a``, largest first; rounding in place of a zero is set to zero."""
    if not bool(a.any()) or not bool(b.any()):
        return [0.0] * min(a.shape[0], a.shape[1], b.shape[0])
    left_part = torch.linalg.qr(b.double(), mode="r").R
    right_part = torch.linalg.qr(a.double().T, mode="r").R
    values = torch.linalg.svdvals(scale * left_part @ right_part.T)
    noise = values[0] * max(a.shape[1], b.shape[0]) * torch.finfo(torch.float64).eps
    return [float(value) if value > noise else 0.0 for value in values]
