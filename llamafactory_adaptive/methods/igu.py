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
clipping. Once the mask is final, and on the given ranks of a second stage, nothing is scored and ``shrink`` trains at
a = 1. ``integrated`` takes |IG|.

Cost: shrink and off, two fp32 numbers per adapter weight and a few element-wise passes over the adapter per step;
integrated, two more forward-backward passes per probed step.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, ClassVar

from torch import Tensor

from llamafactory_adaptive.methods import InitialAdapter, MethodTraits, Orthogonality, ReturnRule, Shrinkage
from llamafactory_adaptive.methods._running_stats import SmoothedMethod
from llamafactory_adaptive.options import option
from llamafactory_adaptive.seeding import seeded_index


# The options that make up a variant; each can be set on its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "corrected": {
        "importance": "off",
        "descale": True,
        "mend_strength": True,
        "uncertainty": "product",
        "epsilon": 1.0,
        "epsilon_scale": "relative",
        "init": "lora",
        "hysteresis": 0.1,
        "returning_lambda": "zero",
        "orthogonality_weight": 0.0,
        "orthogonality_scale": "relative",
    },
    "published": {
        "importance": "shrink",
        "descale": False,
        "mend_strength": False,
        "uncertainty": "snr",
        "epsilon": 1e-6,
        "epsilon_scale": "absolute",
        "init": "gaussian",
        "hysteresis": 0.0,
        "returning_lambda": "former",
        "orthogonality_weight": 1.0,
        "orthogonality_scale": "absolute",
    },
}


def part(help: str, **rules: Any) -> Any:
    """Declare an option whose default depends on ``variant``; runs of earlier versions had the published one."""
    name = rules.pop("name")
    values = " and ".join(f"{_shown(parts[name])} in {variant}" for variant, parts in VARIANTS.items())
    return option(None, f"{help} Default: {values}.", before=VARIANTS["published"][name], **rules)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class IguOptions:
    """Options of IGU-LoRA, the YAML keys ``igu_*``."""

    variant: str = option(
        "corrected",
        "Defaults of the options below that are left out: corrected trains well and mends what was measured to be at "
        "fault; published is the released implementation.",
        choices=("corrected", "published"),
        before="published",
    )
    importance: str | None = part(
        "Gradient from which importance is computed: shrink trains and scores at a random point of the path from 0 to "
        "the adapter, without extra passes; integrated probes the path with extra passes; off takes the plain "
        "gradient.",
        name="importance",
        choices=("shrink", "integrated", "off"),
    )
    descale: bool | None = part(
        "Whether shrink takes the drawn position out of the scores; all micro-batches of a step then share one "
        "position.",
        name="descale",
    )
    mend_strength: bool | None = part(
        "Whether an adapter that was trained under shrink is weakened to the strength that suits the full position, "
        "in evaluations, in what is saved, and for good once the ranks are final.",
        name="mend_strength",
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
    uncertainty: str | None = part(
        "How the mean S and the deviation U of the importance are combined: snr takes S / U, product takes S * U as "
        "AdaLoRA does, mean takes S alone, discounted takes S * S / (S + U).",
        name="uncertainty",
        choices=("snr", "product", "mean", "discounted"),
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
    epsilon: float | None = part(
        "Number that is added to S and U before one is divided by the other.", name="epsilon", low=1e-30, high=1e6
    )
    epsilon_scale: str | None = part(
        "Unit of igu_epsilon: absolute, or relative to the geometric mean of S over all elements of a kind (lambda, P "
        "or Q), so that ranks do not depend on lora_alpha.",
        name="epsilon_scale",
        choices=("absolute", "relative"),
    )
    init: str | None = part(
        "Adapter at the first step: gaussian draws P and Q from N(0, 0.02) and sets lambda to 0.1; lora sets P to "
        "zero, draws Q as LoRA draws A and sets lambda to 1, so that the learning rates of plain LoRA suit.",
        name="init",
        choices=("gaussian", "lora"),
    )
    hysteresis: float | None = part(
        "Share by which the scores of components in use are raised, so that others replace them only if they are that "
        "much better.",
        name="hysteresis",
        low=0.0,
        high=10.0,
    )
    returning_lambda: str | None = part(
        "Lambda of a component that comes back after it was removed: former keeps the value from before, zero lets it "
        "grow anew.",
        name="returning_lambda",
        choices=("former", "zero"),
    )
    orthogonality: str = option(
        "off_diagonal",
        "Orthogonality regulariser on the Gram matrices of P and Q: off_diagonal penalises their off-diagonal part, "
        "identity their difference from the identity, none penalises nothing.",
        choices=("off_diagonal", "identity", "none"),
    )
    orthogonality_weight: float | None = part(
        "Weight of the orthogonality regulariser.", name="orthogonality_weight", low=0.0, high=1e6
    )
    orthogonality_scale: str | None = part(
        "Unit of igu_orthogonality_weight: absolute is a factor in the loss; relative is the norm of the "
        "regulariser's gradient as a share of that of the training gradient.",
        name="orthogonality_scale",
        choices=("absolute", "relative"),
    )

    second_stage: str = option(
        "triplet",
        "Adapter on the ranks of adaptive_plan: triplet trains P diag(lambda) Q from igu_init with the orthogonality "
        "regulariser, as the second stage of the authors does; lora trains plain LoRA.",
        choices=("triplet", "lora"),
    )

    def __post_init__(self) -> None:
        for name, value in self.complete(asdict(self)).items():
            object.__setattr__(self, name, value)

    @staticmethod
    def complete(values: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the options that are left out, by ``variant``."""
        given = {name: value for name, value in values.items() if value is not None}
        return {**values, **VARIANTS[values["variant"]], **given}


_OF_THE_ADAPTER = ("variant", "init", "orthogonality", "orthogonality_weight", "orthogonality_scale")


class Igu(SmoothedMethod):
    """The method registered as ``igu``."""

    Options: ClassVar[type[IguOptions]] = IguOptions
    concentration_advice: ClassVar[str] = ""

    def __init__(self, options: IguOptions) -> None:
        super().__init__(options)
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
        )

    @property
    def initial_adapter(self) -> InitialAdapter:
        return InitialAdapter(1.0, "lora") if self.options.init == "lora" else InitialAdapter(0.1, "gaussian")

    @property
    def return_rule(self) -> ReturnRule:
        return ReturnRule(self.options.hysteresis or 0.0, self.options.returning_lambda == "zero")

    @property
    def shrinkage(self) -> Shrinkage | None:
        if self.options.importance != "shrink" or not self.options.mend_strength:
            return None
        positions = [node / self.options.intervals for node in range(1, self.options.intervals + 1)]
        return Shrinkage(fmean(a**3 for a in positions), fmean(a**6 for a in positions))

    @property
    def orthogonality(self) -> Orthogonality | None:
        o = self.options
        if o.orthogonality == "none" or not o.orthogonality_weight:
            return None
        return Orthogonality(o.orthogonality_weight, o.orthogonality, o.orthogonality_scale == "relative")

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        """Draw one of 1/N .. 1 for ``shrink``, one per step where scores are descaled; return 1 otherwise."""
        if self.options.importance != "shrink":
            return 1.0
        draw = seeded_index(seed, step, 0 if self.options.descale else micro_batch, self.options.intervals)
        position = (1 + draw) / self.options.intervals
        self._cube = position**3 if self.options.descale else 1.0
        return position

    def path(self, seed: int, step: int) -> list[tuple[float, float]]:
        """Return a random interior node and the end point for ``integrated``, every ``probe_interval`` steps."""
        if step % self.options.probe_interval:
            return []
        return sampled_path(self.options.intervals, 1 + seeded_index(seed, step, 0, self.options.intervals - 1))

    def observe(self, block: str, weights: Tensor, gradients: Tensor, live: Tensor | None) -> None:
        """Update S and U with ``s = |w g|``, g at the full position where scores are descaled."""
        super().observe(block, weights, gradients if self._cube == 1.0 else gradients.div_(self._cube), live)

    def element_scores(self, block: str, weights: Tensor) -> Tensor:
        """Combine S and U of each element; for lambda return its magnitude if so set."""
        kind, o = block.partition("/")[0], self.options
        if kind == "lambda" and o.lambda_term == "magnitude":
            return weights.abs()
        if o.uncertainty == "snr":
            return self.importance.snr(block, (o.epsilon or 0.0) * self._typical.get(kind, 1.0))
        if o.uncertainty == "mean":
            return self.importance.mean[block].clone()
        return self.importance.product(block) if o.uncertainty == "product" else self.importance.discounted(block)

    def log_importance(self, block: str) -> Tensor:
        return self.importance.log_sum(block)

    def set_typical(self, typical: Mapping[str, float]) -> None:
        self._typical = dict(typical)


def sampled_path(intervals: int, node: int) -> list[tuple[float, float]]:
    """Build passes whose weighted sum estimates the trapezoid rule without bias, for a uniformly drawn ``node``.

    The node a = 0 is left out: there the gradient of a product of three is zero.
    """
    return [(node / intervals, (intervals - 1) / intervals), (1.0, 0.5 / intervals)]
