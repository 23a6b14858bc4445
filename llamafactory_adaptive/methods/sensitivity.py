"""Sensitivity-LoRA (arXiv 2509.09119): static ranks from the diagonal of each layer's Hessian.

Signal (Eq. 2-7): a small change dw of a layer raises its reconstruction error by ``1/2 sum_i h_ii dw_i^2`` with
``H ~ X X^T``, so ``lambda_j = mean_t x_tj^2`` over calibration tokens tells how sensitive input feature j is.
Per module, with lambda sorted in falling order and N = d_in:

    S_g = sum_j lambda_j                                        global
    S_T = mean of the N/2 largest lambda_j                      local, top-k (Eq. 9)
    S_E = min{k : sum_{j<=k} lambda_j >= 0.85 sum_j lambda_j}   local, effective rank (Eq. 10)
    S_l   = (sigma_T/mu_T^2) S_T + (sigma_E/mu_E^2) S_E         sigma, mu over the modules (Eq. 11-14)
    theta = (sigma_g/mu_g^2) S_g + (sigma_l/mu_l^2) S_l

SRA (Eq. 15): rank proportional to theta. PRA (Section 4.4): modules sorted by theta and cut into c classes, class
j = 1..c gets r + (c + 1)/2 - j. With ``adaptive_budget_unit: ranks`` and classes of one size these are the ranks; a
budget in parameters cannot hold them exactly where classes differ in cost, and scales them to fit.

What differs: padding is left out of the mean; N is d_in, not d_in * d_out; ``transform`` and ``weighting`` are ours,
against massive activations and against ties of modules that read one input. By default every metric is compressed,
``log(1 + metric / median)``, before it is combined: as published (``transform: none``), three modules take most of the
score on pretrained models (benchmarks/sensitivity_transforms.py, which chose the default). Cost: one forward pass (and
a backward pass with ``weighting: gradient``); memory, one vector per module.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.methods import MethodTraits, Scores, ScoringContext
from llamafactory_adaptive.methods._module_metrics import (
    combine,
    effective_rank,
    log_compress,
    normalise_within,
    top_k_mean,
    weigh,
)
from llamafactory_adaptive.options import option
from llamafactory_adaptive.ranks.module_names import module_type


logger = logging.getLogger("llamafactory.adaptive")


@dataclass(frozen=True)
class SensitivityOptions:
    """Options of Sensitivity-LoRA, the YAML keys ``sensitivity_*``."""

    metric: str = option(
        "both",
        "How the sensitivity of a module is measured: global takes the trace, local takes the top-k mean and the "
        "effective rank, both combines the two as the paper does.",
        choices=("both", "global", "local"),
    )
    combination: str = option(
        "dispersion",
        "How several metrics are weighted: dispersion weights each by its spread over the modules, sigma/mu^2, as the "
        "paper does; equal gives them the same weight.",
        choices=("dispersion", "equal"),
    )
    top_fraction: float = option(
        0.5,
        "Share of the input features that enter the top-k mean, those with the largest values.",
        low=1e-6,
        high=1.0,
    )
    energy: float = option(
        0.85,
        "Share of the trace that the largest input features must reach together; their number is the effective rank.",
        low=1e-6,
        high=1.0,
    )
    transform: str = option(
        "log",
        "Transform of the metrics, so that a few modules with massive activations do not take most ranks: log takes "
        "log(1 + metric / median), per_type divides by the mean over modules of the same type (q_proj, k_proj, ...), "
        "none leaves the metrics as they are, which is the paper's formula.",
        choices=("none", "log", "per_type"),
    )
    weighting: str = option(
        "none",
        "Weight of each token: none weights all tokens equally, as in the paper; gradient weights a token by its "
        "squared gradient norm at the module's output, which needs a backward pass.",
        choices=("none", "gradient"),
    )
    allocation: str = option(
        "sra",
        "How sensitivity becomes ranks: sra makes ranks proportional to it, pra sorts modules into classes and sets "
        "the ranks by class.",
        choices=("sra", "pra"),
    )
    classes: int = option(
        3, "Number of classes into which sensitivity_allocation: pra sorts the modules.", low=1, high=99, odd=True
    )


class Sensitivity:
    """The method registered as ``sensitivity``."""

    Options: ClassVar[type[SensitivityOptions]] = SensitivityOptions
    traits: ClassVar[MethodTraits] = MethodTraits("fixed")
    concentration_advice: ClassVar[str] = (
        "massive activations; a lower adaptive_max_rank bounds what one module gets; sensitivity_transform: log, the "
        "default, spreads the score most"
    )

    def __init__(self, options: SensitivityOptions) -> None:
        self.options = options

    def measurement(self) -> InputSecondMoments:
        """Return the measurement, one pass over the calibration data."""
        return InputSecondMoments(weighting=self.options.weighting)

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Compute theta per module (SRA) or its class rank (PRA), with every metric as a column.

        Args:
            statistics: module name to lambda, a vector of length ``in_features``.
            context: shapes in model order and the budget.

        Raises:
            CalibrationError: a module's statistics are not finite, are negative, or are zero throughout.
        """
        names = [shape.name for shape in context.shapes]
        lambdas = [statistics[name].double() for name in names]
        _refuse_nonsense(names, lambdas)
        raw = {
            "trace": torch.stack([value.sum() for value in lambdas]),
            "top_k": torch.stack([top_k_mean(value, self.options.top_fraction) for value in lambdas]),
            "effective_rank": torch.stack([effective_rank(value, self.options.energy) for value in lambdas]).double(),
        }
        theta_M = self._theta(*(self._transform(metric_M, names) for metric_M in raw.values()))
        score_M = theta_M if self.options.allocation == "sra" else self._class_ranks(theta_M, context.lora_rank)
        columns = {**raw, "theta": theta_M}
        return Scores(
            values=dict(zip(names, score_M.tolist(), strict=True)),
            metrics={column: dict(zip(names, value.tolist(), strict=True)) for column, value in columns.items()},
        )

    def _transform(self, metric_M: Tensor, names: list[str]) -> Tensor:
        if self.options.transform == "log":
            return log_compress(metric_M)
        if self.options.transform == "per_type":
            return normalise_within(metric_M, [module_type(name) for name in names])
        return metric_M

    def _theta(self, trace_M: Tensor, top_k_M: Tensor, rank_M: Tensor) -> Tensor:
        equal = self.options.combination == "equal"
        if self.options.metric == "global":
            theta_M = weigh(trace_M, equal)
        else:
            local_M = combine(top_k_M, rank_M, equal)
            theta_M = local_M if self.options.metric == "local" else combine(trace_M, local_M, equal)
        # Metrics that are equal over all modules have no spread: nothing sets modules apart, so all weigh the same.
        if bool((theta_M == 0).all()):
            if len(theta_M) > 1:
                logger.warning("sensitivity: all modules have the same statistics, so all get the same rank")
            return torch.ones_like(theta_M)
        if not bool(torch.isfinite(theta_M).all()):
            raise CalibrationError("sensitivities of the modules are out of range: check the calibration statistics")
        return theta_M

    def _class_ranks(self, theta_M: Tensor, lora_rank: int) -> Tensor:
        """Compute the ranks of PRA, whose class 1 holds the most sensitive modules; ranks below zero become zero."""
        order = theta_M.argsort(descending=True, stable=True)
        ranks_M = torch.empty_like(theta_M)
        for index, members in enumerate(order.tensor_split(self.options.classes)):
            ranks_M[members] = max(0.0, lora_rank + (self.options.classes + 1) / 2 - (index + 1))
        return ranks_M


def _refuse_nonsense(names: list[str], lambdas: list[Tensor]) -> None:
    """Raise an error if second moments are not finite, are negative, or are zero throughout."""
    kinds = {
        "NaN or infinity": [not bool(torch.isfinite(value).all()) for value in lambdas],
        "negative second moments": [bool((value < 0).any()) for value in lambdas],
        "zeros only": [not bool(value.any()) for value in lambdas],
    }
    for kind, flags in kinds.items():
        wrong = [name for name, flag in zip(names, flags, strict=True) if flag]
        if wrong:
            raise CalibrationError(
                f"statistics hold {kind} for {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}: check the base "
                "model and the calibration data"
            )
