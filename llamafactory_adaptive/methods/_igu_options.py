"""Options of IGU-LoRA, and the two variants that give most of them their defaults. Without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.methods._running_stats import check_statistics_dtype, statistics_dtype
from llamafactory_adaptive.options import option


# The options that make up a variant; each can be set on its own.
VARIANTS: dict[str, dict[str, Any]] = {
    "corrected": {
        "importance": "off",
        "descale": True,
        "mend_strength": None,  # mended, for good only where no training follows
        "uncertainty": "mean",
        "epsilon": 1.0,
        "epsilon_scale": "relative",
        "init": "lora",
        "hysteresis": 0.0,
        "returns": "none",
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
        "returns": "former",
        "orthogonality_weight": 1.0,
        "orthogonality_scale": "absolute",
    },
}


def part(help: str, **rules: Any) -> Any:
    """Declare an option whose default depends on ``variant``; runs of earlier versions had the published one."""
    name, undecided = rules.pop("name"), rules.pop("undecided", "")
    values = " and ".join(f"{_shown(parts[name], undecided)} in {variant}" for variant, parts in VARIANTS.items())
    return option(None, f"{help} Default: {values}.", before=VARIANTS["published"][name], **rules)


def _default_beta1(uncertainty: str | None) -> float:
    """Return 0.999 where S counts alone: it is a mean from the first step on, and steadier the more it averages."""
    return 0.999 if uncertainty == "mean" else 0.85


def _shown(value: Any, undecided: str) -> str:
    if value is None:
        return undecided
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
        "Whether scores of different steps are comparable, whatever position was drawn: shrink takes it out of the "
        "scores, and all micro-batches of a step share one; integrated draws positions near the adapter more often "
        "and lets them weigh less.",
        name="descale",
    )
    mend_strength: bool | None = part(
        "Whether an adapter that was trained under shrink is weakened to the strength that suits the full position: "
        "in evaluations, in what is saved, and for good, by lambda, once the ranks are final; all micro-batches of a "
        "step then share one position.",
        name="mend_strength",
        undecided="true, but by lambda only where no training follows,",
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
        "AdaLoRA does, discounted takes S * S / (S + U), mean takes S alone, as a mean from the first step on, and "
        "keeps numbers of components in place of elements.",
        name="uncertainty",
        choices=("snr", "product", "mean", "discounted"),
    )
    lambda_term: str = option(
        "snr",
        "Term that lambda adds to a component's score: snr adds the score of lambda itself, as the released code "
        "does; magnitude adds |lambda|, as the paper does.",
        choices=("snr", "magnitude"),
    )
    beta1: float | None = option(
        None,
        "Decay rate of the running mean S of the importance; a larger one smooths more. Default: 0.999 with "
        "igu_uncertainty: mean and 0.85 otherwise.",
        low=0.0,
        high=0.9999,
        before=0.85,
    )
    beta2: float = option(
        0.85,
        "Decay rate of the running deviation U of the importance; a larger one smooths more.",
        low=0.0,
        high=0.9999,
    )
    statistics_dtype: str = statistics_dtype(" With igu_uncertainty: mean nothing is kept per element.")
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
    returns: str | None = part(
        "Whether components that were removed may come back: none lets them fill only what components in use leave of "
        "the budget, former lets them come back with the lambda that they had, zero with a lambda that grows anew.",
        name="returns",
        choices=("none", "former", "zero"),
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
        before="lora",
    )

    def __post_init__(self) -> None:
        for name, value in self.complete(asdict(self)).items():
            object.__setattr__(self, name, value)

    @staticmethod
    def complete(values: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the options that are left out, by ``variant``."""
        given = {name: value for name, value in values.items() if value is not None}
        complete = {**values, **VARIANTS[values["variant"]], **given}
        return {
            **complete,
            "beta1": _default_beta1(complete["uncertainty"]) if complete["beta1"] is None else complete["beta1"],
        }

    def check(self) -> list[Problem]:
        """List options that were set but have no effect because of others.

        A value that is the variant's own default is not told from one that was left out; neither is refused.
        """
        defaults = {entry.name: entry.default for entry in fields(self)} | VARIANTS[self.variant]
        defaults["beta1"] = _default_beta1(self.uncertainty)
        differing = [name for name, value in asdict(self).items() if value != defaults[name]]
        idle_ones = [
            Problem(f"igu_{name}", getattr(self, name), reason, f"leaving igu_{name} out, or {remedy}")
            for idle, names, reason, remedy in self._idle()
            for name in differing
            if idle and name in names
        ]
        if self.uncertainty == "mean":
            return idle_ones
        return idle_ones + check_statistics_dtype("igu", self.statistics_dtype, beta1=self.beta1, beta2=self.beta2)

    def _idle(self) -> list[tuple[bool, tuple[str, ...], str, str]]:
        """Build the table of options that other options leave without effect: whether, which, why and what to set."""
        path, snr, unweighted = self.importance != "off", self.uncertainty == "snr", self.orthogonality_weight == 0.0
        none = self.orthogonality == "none"  # says the same as a weight of 0, so the two may stand together
        weighted = ("orthogonality_scale", *(() if none else ("orthogonality",)))
        return [
            (self.importance != "shrink", ("mend_strength",), "only igu_importance: shrink trains a weakened adapter",
             "igu_importance: shrink"),
            (not path, ("descale", "intervals"), "with igu_importance: off there is no path to draw positions from",
             "igu_importance: shrink"),
            (self.importance != "integrated", ("probe_interval",), "only igu_importance: integrated probes",
             "igu_importance: integrated"),
            (not snr, ("epsilon", "epsilon_scale"), "only igu_uncertainty: snr divides", "igu_uncertainty: snr"),
            (self.uncertainty == "mean", ("beta2",), "with igu_uncertainty: mean the deviation does not count",
             "igu_uncertainty: product"),
            (self.uncertainty == "mean", ("statistics_dtype",), "with igu_uncertainty: mean no element is kept",
             "igu_uncertainty: product"),
            (unweighted, weighted, "with igu_orthogonality_weight: 0 there is no regulariser",
             "igu_orthogonality_weight: 0.1"),
            (none and not unweighted, ("orthogonality_weight", "orthogonality_scale"),
             "with igu_orthogonality: none there is no regulariser", "igu_orthogonality: off_diagonal"),
        ]  # fmt: skip
