"""The gradient of the orthogonality penalty."""

import torch
from torch import Tensor


def gram_penalty_gradient(
    x_M: Tensor, kind: str, form: str, scale: float = 1.0, used_Mr: Tensor | None = None
) -> Tensor:
    """Compute the gradient of ``scale`` times the sum over M of ``|E(gram)|_F``.

    E removes the diagonal of a Gram matrix, or subtracts the identity. The gradient is zero where E is zero.

    Args:
        x_M: stacked P, (M, d_out, r) with Gram ``P^T P``, or stacked Q, (M, r, d_in) with Gram ``Q Q^T``.
        kind: ``P`` or ``Q``.
        form: ``off_diagonal`` or ``identity``.
        scale: factor of the penalty.
        used_Mr: 1.0 for components that count, 0.0 for those that E leaves out; None if all count.
    """
    if used_Mr is not None:
        x_M = x_M * (used_Mr[:, None, :] if kind == "P" else used_Mr[:, :, None])
    gram_Mrr = x_M.mT @ x_M if kind == "P" else x_M @ x_M.mT
    if form == "off_diagonal":
        gram_Mrr.diagonal(dim1=1, dim2=2).zero_()
    else:
        gram_Mrr.diagonal(dim1=1, dim2=2).sub_(1.0 if used_Mr is None else used_Mr)
    norm_M = gram_Mrr.flatten(1).norm(dim=1)
    factor_M = torch.where(norm_M > 0, 2.0 * scale / norm_M, torch.zeros_like(norm_M))
    gram_Mrr.mul_(factor_M.view(-1, 1, 1))
    return x_M @ gram_Mrr if kind == "P" else gram_Mrr @ x_M
