"""SVD cut: trains over-ranked, cuts to the budget by the singular values of all modules at once, and trains on.

"Train high, cut later" of LoRA-Squeeze (arXiv 2602.10993), with one order of singular values over all modules as in
PARA (arXiv 2604.27796). The adapter is plain LoRA of rank ``adaptive_init_rank``, ``Delta W = s P Q``, until
``adaptive_final_ratio`` of all steps are left (0: cut after the last step). Then, per module,

    P = U_P R_P,  Q^T = U_Q R_Q               QR, of d x r matrices
    R_P R_Q^T = U diag(sigma) V^T             SVD of an r x r core; d x d is never formed
    P <- U_P U diag(sigma) / c,  Q <- c V^T U_Q^T

which leaves the product as it is, and a component scores ``sigma_i^2 / cost``, cost the parameters of one of its ranks
(1 with ``adaptive_budget_unit: ranks``): what |Delta W - cut|_F^2, summed over modules, grows by for each parameter
saved. s is the same for all modules and cancels. The best within the budget stay, the others are masked.

What no source states, and is ours: the score per parameter; ``split``, how the factors share sigma after the cut: by
default rows of Q keep the mean square they had (c), as they set how far a step of the optimizer moves the product,
``balanced`` gives both factors sqrt(sigma). The optimizer's momenta restart from zero, its squared gradients from
their mean over the factor: after the rotation they belong to other directions.

Cost: optimizer states and activations of ``adaptive_init_rank`` to the end, since shapes stay; nothing per step; at
the cut every process holds all factors once in fp32, and rotates them in fp64 on its CPU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llamafactory_adaptive.calibration.factored_svd import decompose
from llamafactory_adaptive.methods import InitialAdapter, MethodTraits, ReturnRule
from llamafactory_adaptive.options import option


@dataclass(frozen=True)
class SvdOptions:
    """Options of the cut by singular values, the YAML keys ``svd_*``."""

    split: str = option(
        "rows",
        "How the factors share a singular value after the cut: rows lets the rows of A keep their mean square, so "
        "that steps move the product as far as before; balanced gives both factors its root.",
        choices=("rows", "balanced"),
    )


class Svd:
    """The method registered as ``svd``."""

    Options: ClassVar[type[SvdOptions]] = SvdOptions
    traits: ClassVar[MethodTraits] = MethodTraits("prune", spectral=True)
    concentration_advice: ClassVar[str] = ""
    initial_adapter: ClassVar[InitialAdapter] = InitialAdapter(None, "lora")
    return_rule: ClassVar[ReturnRule] = ReturnRule()
    shrinkage: ClassVar[None] = None
    orthogonality: ClassVar[None] = None

    def __init__(self, options: SvdOptions) -> None:
        self.options = options

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        return 1.0

    def rotate(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate P (d_out, r) and Q (r, d_in) to the form of the singular values of P Q; return their squares, too.

        Signs are those that make the largest entry of each row of Q positive.
        """
        product = decompose(q, p, 1.0)
        sigma_r, rows = product.values, product.right
        signs_r1 = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
        size_r = q.double().square().sum(1).mean().sqrt().expand_as(sigma_r)
        if self.options.split == "balanced":
            # What is zero but for rounding keeps a row of the usual size, without which it could not train.
            size_r = torch.where(sigma_r > 1e-6 * sigma_r.max(), sigma_r.sqrt(), size_r)
        new_p, new_q = product.left * (sigma_r / size_r) * signs_r1.T, rows * signs_r1 * size_r[:, None]
        return new_p.to(p), new_q.to(q), sigma_r.square()

    def state(self) -> dict[str, Tensor]:
        """Return nothing: singular values are those of the weights."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore nothing, as nothing was stored."""
