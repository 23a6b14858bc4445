"""Size of the first AdamW update of an adapter against that of plain LoRA at the same learning rate. Pure: no torch.

Adam's first step moves every element that has a gradient by the learning rate ``lr``, whatever the gradient's size. To
first order a component lambda p q (p a column of P, q a row of Q, s the scale) then moves by

    s (lambda dp q + lambda p dq + dlambda p q),    |dp| = lr sqrt(d_out), |dq| = lr sqrt(d_in), |dlambda| = lr.

The signs of dp, dq and dlambda are about independent of p and q, so the three parts add in quadrature:

    |dDelta W| = s lr sqrt((lambda |q|)^2 d_out + (lambda |p|)^2 d_in + (|p| |q|)^2)

plain LoRA   lambda = 1 (it has none), p = 0, q uniform in +-1/sqrt(d_in), so |q| = 1/sqrt(3) = 0.577. Only p has a
             gradient: s lr 0.577 sqrt(d_out).
gaussian     p and q from N(0, 0.02), so |p| = 0.02 sqrt(d_out), |q| = 0.02 sqrt(d_in):
             s lr 0.02 sqrt(d_in d_out) sqrt(2 lambda^2 + 0.02^2). With lambda = 0 only lambda has a gradient.
eva          lambda = 1, p = 0, q orthonormal, so |q| = 1: s lr sqrt(d_out), 1.7 times plain LoRA's. As q lies
             where inputs vary most, outputs move by more than that.
gora         lambda = 1, q as plain LoRA draws it, p from the gradient: s lr sqrt(0.577^2 d_out + |p|^2 d_in), at least
             plain LoRA's. How much more depends on the gradient; for |p| far below |q| it is little.

Their ratio does not depend on d_out. It holds for the first step alone: where lambda starts at zero, it grows by about
lr a step, and the updates of P and Q with it.
"""

import math
from collections.abc import Sequence
from statistics import median

from llamafactory_adaptive.ranks.plan import ModuleShape


FACTOR_STD = 0.02  # of P and Q at the start, in AdaLoRA and IGU-LoRA alike
_LORA_ROW = 3**-0.5  # norm of a row that LoRA draws


def slowdown(lambda_value: float | None, factors: str, shape: ModuleShape) -> float:
    """Compute how many times smaller a component's first update is than plain LoRA's, at one scale and learning rate.

    Args:
        lambda_value: lambda at the start; None for an adapter without lambda.
        factors: ``gaussian`` for P and Q from N(0, 0.02), ``lora`` for P zero and Q drawn as LoRA draws A.
        shape: the module.
    """
    size = 1.0 if lambda_value is None else abs(lambda_value)
    if factors == "lora":
        return 1.0 / size if size else math.inf
    return _LORA_ROW / (FACTOR_STD * math.sqrt(shape.in_features) * math.hypot(size, size, FACTOR_STD))


def slowdown_of_norms(p: float, q: float, shape: ModuleShape) -> float:
    """Compute :func:`slowdown` of an adapter without lambda from norms that its components have at the start.

    Args:
        p: norm of a column of P; the root of their mean square where they differ.
        q: norm of a row of Q, likewise.
        shape: the module.
    """
    both = math.hypot(q * math.sqrt(shape.out_features), p * math.sqrt(shape.in_features))
    return _LORA_ROW * math.sqrt(shape.out_features) / both


def median_slowdown(lambda_value: float | None, factors: str, shapes: Sequence[ModuleShape]) -> float:
    """Compute the median of :func:`slowdown` over modules."""
    return median(slowdown(lambda_value, factors, shape) for shape in shapes)
