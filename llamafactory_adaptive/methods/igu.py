"""IGU-LoRA (arXiv 2603.13792): starts over-ranked, prunes components by integrated gradients and uncertainty.

Adapter (Eq. 2): ``Delta W = P diag(lambda) Q`` of rank 2 x ``lora_rank``. A component is lambda_i, column i of P, row
i of Q.

Importance of an element w, by ``importance``:

    integrated  IG(w) = w int_0^1 dL(a theta)/dw da, theta all adapter weights (Eq. 4-7); trapezoid with N intervals.
                Per step the estimator takes the end points and one random interior node k:
                w/N [ g(0)/2 + (N-1) g(k/N) + g(1)/2 ]; g(0) = 0, since P diag(lambda) Q is a product of three.
    shrink      the training forward runs at a random a = k/N (output of the adapter times a^3); s = |w dL/dw| with the
                gradient that trains (released implementation; no extra pass)
    off         s = |w dL/dw| at a = 1 (the paper's ablation)

Smoothing (Eq. 10-12): S <- b1 S + (1-b1) s; U <- b2 U + (1-b2)|s - S|; score (S + e)/(U + e). A component scores
score(lambda_i) + mean_k score(P_ki) + mean_k score(Q_ik) (Eq. 3); the globally best are kept under the cubic budget.

The variant ``published`` is the released implementation: P, Q ~ N(0, 0.02), lambda = 0.1, ``shrink``, the ratio of S
and U, regulariser of weight 1. ``corrected`` mends what was measured to be at fault; every part has its own option:

    init              P = 0, Q as LoRA draws A, lambda = 1: as long as P is zero only P has a gradient, and it is the
                      one of LoRA's B, so the first update of Delta W is LoRA's at the same learning rate. From N(0,
                      0.02) and 0.1 it is several times smaller.
    descale           under ``shrink`` the gradient carries a^3, so that S / U measures the draws of a. All micro-
                      batches of a step share one a (with mend_strength, too), whose cube is divided out of what is
                      scored. ``integrated`` draws its node in proportion to (k/N)^2, as g(a) grows, and weighs it
                      by one over its probability: the expectation is the same, and where the loss is linear in the
                      adapter every draw is.
    mend_strength     trained under ``shrink``, the adapter minimises E L(a^3 theta): on a quadratic it ends up
                      E a^3 / E a^6 = 1.63 times too strong. What is evaluated and saved is weakened by E a^6 / E a^3,
                      and lambda is once the ranks are final, where nothing trains after that. Training that goes on
                      finds the strength by itself; with ``true`` lambda is weakened there as well, the optimizer's
                      states with it, so that neither output nor updates jump.
    uncertainty       S * U (AdaLoRA), S * S / (S + U) or S alone do not depend on the scale of gradients; nor does
    epsilon_scale     S / U with an epsilon in units of the geometric mean of S over all elements of a kind. S alone
                      is a mean of nearly all steps (beta1): which components stay is then decided less by rounding
                      than with S * U, and as a mean it can be kept per component.
    returns           what was removed stays off, but for what it takes to fill the budget: components that come back
                      at their former strength, and others that go for them, are most of the changes otherwise. With
                      zero they grow anew; a bonus for those in use (hysteresis) helps less.
    orthogonality_scale  the regulariser's gradient is a share of the training gradient, whatever the loss scale.

What differs from the paper in both: t_i and t_f are ratios of all steps. A masked component adds exactly nothing until
it comes back (in the released code it drifts between allocations, over budget); its lambda is observed but not trained
(momentum, weight decay and regulariser still act on its factors). With ``min_rank`` 0, modules that servers keep
packed (q, k, v; gate, up) lose all components together or not at all, where the code looks at each alone. P and Q of a
masked component, whose gradient is zero only because of the mask, keep S and U meanwhile. Scores use the gradient of
the loss without the regulariser, before clipping. Once the mask is final, nothing is scored and ``shrink`` trains at a
= 1. ``integrated`` takes |IG|, and weighs the interior node by (N-1)/N: Eq. 6, |w|/2N [ g(0) + 2 g(k/N) + g(1) ],
counts one node of N-1 as if it were all of them, and falls short of Eq. 5 by most of the path. With our weight the
expectation over k is Eq. 5, at every step alike (``tests/unit/training/test_path_probe.py``), so steps are comparable
in the mean. A single step is only if descaled: with uniform draws, and a loss that is linear in the adapter, its score
has a standard deviation of 0.80 of its expectation (from 0.08 to 2.6 times, N = 20), S after some steps one of 0.23,
and U measures that, too.

Cost: shrink and off, an element-wise pass over the adapter per step, and a number per component with S alone; two fp32
numbers per adapter weight and a few more passes otherwise, and where ``lambda_term`` is ``magnitude``. integrated, two
more forward-backward passes per probed step.
"""

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from statistics import fmean
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.methods import InitialAdapter, MethodTraits, Orthogonality, ReturnRule, Shrinkage
from llamafactory_adaptive.methods._igu_options import IguOptions
from llamafactory_adaptive.methods._running_stats import RunningMean, SmoothedImportance, SmoothedMethod
from llamafactory_adaptive.seeding import seeded_index


_OF_THE_ADAPTER = ("variant", "init", "orthogonality", "orthogonality_weight", "orthogonality_scale")


class Igu(SmoothedMethod):
    """The method registered as ``igu``."""

    Options: ClassVar[type[IguOptions]] = IguOptions
    concentration_advice: ClassVar[str] = ""
    importance: SmoothedImportance | RunningMean

    def __init__(self, options: IguOptions) -> None:
        beta1 = options.beta1 or 0.0
        alone = options.uncertainty == "mean"
        super().__init__(
            RunningMean(beta1) if alone else SmoothedImportance(beta1, options.beta2, options.statistics_dtype)
        )
        self.options = options
        self._typical: dict[str, float] = {}
        self._cube = 1.0  # the factor on the gradients of this step

    @property
    def traits(self) -> MethodTraits:
        o = self.options
        relative = o.uncertainty == "snr" and o.epsilon_scale == "relative"
        triplets = o.second_stage == "triplet"  # the form of the authors' second stage
        return MethodTraits(
            "prune",
            probes=o.importance == "integrated",
            relative=relative,
            read_with_plan=("second_stage", *(_OF_THE_ADAPTER if triplets else ())),
            only_with_plan=("second_stage",),
            triplets_with_plan=triplets,
            componentwise=o.uncertainty == "mean" and o.lambda_term == "snr",
        )

    @property
    def initial_adapter(self) -> InitialAdapter:
        return InitialAdapter(1.0, "lora") if self.options.init == "lora" else InitialAdapter(0.1, "gaussian")

    @property
    def return_rule(self) -> ReturnRule:
        returns = self.options.returns
        return ReturnRule(self.options.hysteresis or 0.0, returns == "none", returns == "zero")

    @property
    def shrinkage(self) -> Shrinkage | None:
        if self.options.importance != "shrink" or self.options.mend_strength is False:
            return None
        positions = [node / self.options.intervals for node in range(1, self.options.intervals + 1)]
        lasting = self.options.mend_strength is True
        return Shrinkage(fmean(a**3 for a in positions), fmean(a**6 for a in positions), lasting)

    @property
    def orthogonality(self) -> Orthogonality | None:
        o = self.options
        if o.orthogonality == "none" or not o.orthogonality_weight:
            return None
        return Orthogonality(o.orthogonality_weight, o.orthogonality, o.orthogonality_scale == "relative")

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        """Draw one of 1/N .. 1 for ``shrink``, and return 1 otherwise.

        It is one per step where scores are descaled, or where the strength is mended for good: the root mean square
        of the gradients' factor (:class:`~llamafactory_adaptive.methods.Shrinkage`) would be another if they were
        averaged over several draws.
        """
        if self.options.importance != "shrink":
            return 1.0
        one_per_step = self.options.descale or self.options.mend_strength
        index = seeded_index(seed, step, 0 if one_per_step else micro_batch, self.options.intervals)
        position = (1 + index) / self.options.intervals
        self._cube = position**3 if self.options.descale else 1.0
        return position

    def path(self, seed: int, step: int) -> list[tuple[float, float]]:
        """Return a random interior node and the end point for ``integrated``, every ``probe_interval`` steps."""
        o = self.options
        if step % o.probe_interval:
            return []
        odds = [node**2 if o.descale else 1 for node in range(1, o.intervals)]
        drawn = bisect_right(list(accumulate(odds)), seeded_index(seed, step, 0, sum(odds)))
        return sampled_path(o.intervals, 1 + drawn, odds[drawn] / sum(odds))

    def importance_of(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """Compute ``s = |w g|``, g at the full position where scores are descaled."""
        return super().importance_of(weights, gradients if self._cube == 1.0 else gradients.div_(self._cube))

    def component_scores(self, block: str) -> Tensor:
        """Return the mean S of each component's elements, as it is where only S counts."""
        assert isinstance(self.importance, RunningMean)
        return self.importance.mean[block].clone()

    def element_scores(self, block: str, weights: Tensor) -> Tensor:
        """Combine S and U of each element; for lambda return its magnitude if so set."""
        kind, o = block.partition("/")[0], self.options
        if kind == "lambda" and o.lambda_term == "magnitude":
            return weights.abs()
        if isinstance(self.importance, RunningMean):
            return self.importance.mean[block].clone()
        if o.uncertainty == "snr":
            return self.importance.snr(block, (o.epsilon or 0.0) * self._typical.get(kind, 1.0))
        return self.importance.product(block) if o.uncertainty == "product" else self.importance.discounted(block)

    def log_importance(self, block: str) -> Tensor:
        assert isinstance(self.importance, SmoothedImportance)
        return self.importance.log_sum(block)

    def set_typical(self, typical: Mapping[str, float]) -> None:
        self._typical = dict(typical)


def sampled_path(intervals: int, node: int, probability: float) -> list[tuple[float, float]]:
    """Build passes whose weighted sum estimates the trapezoid rule without bias, for a drawn interior ``node``.

    The node a = 0 is left out: there the gradient of a product of three is zero.
    """
    return [(node / intervals, 1.0 / (intervals * probability)), (1.0, 0.5 / intervals)]
