"""IGU-LoRA (arXiv 2603.13792): starts over-ranked, prunes components by integrated gradients and uncertainty.

Adapter (Eq. 2): ``Delta W = P diag(lambda) Q``, P, Q ~ N(0, 0.02), lambda = 0.1, rank 2 x ``lora_rank``. A component
is lambda_i, column i of P, row i of Q.

Importance of an element w, by ``importance``:

    integrated  IG(w) = w int_0^1 dL(a theta)/dw da, theta all adapter weights (Eq. 4-7); trapezoid with N intervals.
                Per step the estimator takes the end points and one random interior node k:
                w/N [ g(0)/2 + (N-1) g(k/N) + g(1)/2 ]; g(0) = 0, since P diag(lambda) Q is a product of three.
    shrink      the training forward runs at a random a = k/N (output of the adapter times a^3); s = |w dL/dw| with the
                gradient that trains (released implementation; no extra pass)
    off         s = |w dL/dw| at a = 1 (the paper's ablation)

Smoothing (Eq. 10-12): S <- b1 S + (1-b1) s; U <- b2 U + (1-b2)|s - S|; score (S + e)/(U + e). A component scores
score(lambda_i) + mean_k score(P_ki) + mean_k score(Q_ik) (Eq. 3); the globally best are kept under the cubic budget.

What differs: t_i and t_f are ratios of all steps. A masked component adds exactly nothing until it comes back (in the
released code it drifts between allocations, over budget); its lambda is observed but not trained (momentum, weight
decay and regulariser still act on its factors); its P and Q, whose gradient is zero only
because of the mask, keep S and U meanwhile. Scores use the gradient of the loss without the regulariser, before
clipping. Once the mask is final, nothing is scored and ``shrink`` trains at a = 1. ``integrated`` takes |IG|.

Cost: shrink and off, two fp32 numbers per adapter weight and a few element-wise passes over the adapter per step;
integrated, two more forward-backward passes per probed step.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.methods import MethodTraits, Orthogonality
from llamafactory_adaptive.methods._running_stats import SmoothedMethod
from llamafactory_adaptive.options import option
from llamafactory_adaptive.seeding import seeded_index


@dataclass(frozen=True)
class IguOptions:
    """Options of IGU-LoRA, the YAML keys ``igu_*``."""

    importance: str = option(
        "shrink",
        "Gradient from which importance is computed: shrink trains and scores at a random point of the path from 0 to "
        "the adapter, without extra passes; integrated probes the path with extra passes; off takes the plain "
        "gradient.",
        choices=("shrink", "integrated", "off"),
    )
    intervals: int = option(
        20,
        "Number N of intervals into which the path from 0 to the adapter is divided.",
        unit="intervals",
        low=2,
        high=10_000,
    )
    probe_interval: int = option(
        1, "Optimizer steps from one probe to the next; only igu_importance: integrated probes.", unit="steps", low=1
    )
    uncertainty: str = option(
        "snr",
        "How the mean S and the deviation U of the importance are combined: snr takes S / U, product takes S * U as "
        "AdaLoRA does.",
        choices=("snr", "product"),
    )
    lambda_term: str = option(
        "snr",
        "Term that lambda adds to a component's score: snr adds the score of lambda itself, as the released code "
        "does; magnitude adds |lambda|, as the paper does.",
        choices=("snr", "magnitude"),
    )
    beta1: float = option(
        0.85, "Decay rate of the running mean S of the importance; a larger one smooths more.", low=0.0, high=0.9999
    )
    beta2: float = option(
        0.85,
        "Decay rate of the running deviation U of the importance; a larger one smooths more.",
        low=0.0,
        high=0.9999,
    )
    epsilon: float = option(
        1e-6, "Small number that is added to S and U before one is divided by the other.", low=1e-30, high=1.0
    )
    orthogonality: str = option(
        "off_diagonal",
        "Orthogonality regulariser on the Gram matrices of P and Q: off_diagonal penalises their off-diagonal part, "
        "identity their difference from the identity, none penalises nothing.",
        choices=("off_diagonal", "identity", "none"),
    )
    orthogonality_weight: float = option(
        1.0, "Weight of the orthogonality regulariser in the loss.", low=0.0, high=1e6
    )


class Igu(SmoothedMethod):
    """The method registered as ``igu``."""

    Options: ClassVar[type[IguOptions]] = IguOptions
    concentration_advice: ClassVar[str] = ""
    initial_lambda: ClassVar[float] = 0.1

    def __init__(self, options: IguOptions) -> None:
        super().__init__(options)
        self.options = options

    @property
    def traits(self) -> MethodTraits:
        return MethodTraits("prune", probes=self.options.importance == "integrated")

    @property
    def orthogonality(self) -> Orthogonality | None:
        if self.options.orthogonality == "none" or self.options.orthogonality_weight == 0:
            return None
        return Orthogonality(self.options.orthogonality_weight, self.options.orthogonality)

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        """Draw one of 1/N .. 1 for ``shrink``; return 1 otherwise."""
        if self.options.importance != "shrink":
            return 1.0
        return (1 + seeded_index(seed, step, micro_batch, self.options.intervals)) / self.options.intervals

    def path(self, seed: int, step: int) -> list[tuple[float, float]]:
        """Return a random interior node and the end point for ``integrated``, every ``probe_interval`` steps."""
        if step % self.options.probe_interval:
            return []
        return sampled_path(self.options.intervals, 1 + seeded_index(seed, step, 0, self.options.intervals - 1))

    def element_scores(self, block: str, weights: Tensor) -> Tensor:
        """Compute SNR or product of each element; for lambda its magnitude if so set."""
        if block.startswith("lambda") and self.options.lambda_term == "magnitude":
            return weights.abs()
        if self.options.uncertainty == "product":
            return self.importance.product(block)
        return self.importance.snr(block, self.options.epsilon)


def sampled_path(intervals: int, node: int) -> list[tuple[float, float]]:
    """Build passes whose weighted sum estimates the trapezoid rule without bias, for a uniformly drawn ``node``.

    The node a = 0 is left out: there the gradient of a product of three is zero.
    """
    return [(node / intervals, (intervals - 1) / intervals), (1.0, 0.5 / intervals)]
