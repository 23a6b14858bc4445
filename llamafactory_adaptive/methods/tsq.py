"""TsqLoRA (arXiv 2509.18585): data-quality sampling joined with sensitivity-driven rank reallocation.

Quality of a training sample, each term z-scored over the training set:

    Q_i = a1 |g_i| + a2 (l_i(theta) - l_i(theta - eta g_i)) + a3 <g_i, mean g> / |mean g|

g_i is the gradient of the sample's mean token loss over the LoRA factors. Training draws from a subset S, chosen
without replacement by p_i = softmax(Q_i / tau). Ranks follow the sensitivity of a module's factors,

    S_m = E |W (.) dL/dW|, mean over the elements in use;  r_m = S_m / sum S * phi(Q(S)) * R0.

What differs, since no full text is public: the second term is eta |g_i|^2 unless ``loss_drop: exact``; the third is
ours, as are the z-scores, the draw without replacement, phi (1, so that the budget holds; ``quality`` is the mean
place of S in the quality order, mapped to [0.5, 1]), the refresh every ``refresh_ratio`` of all steps, and the
smoothing of S_m: E is the mean over all steps of a refresh interval, S_m / sum S is taken per interval, and earlier
intervals count ``beta`` times as much as the next. A component that came back does not count in its first interval:
its B starts at zero, and a module would look insensitive for having grown. Samples are scored once, before the first
step, when B is zero: |g_i| is then the gradient of the B factors.

The adapter is plain LoRA with live rank ``adaptive_max_rank`` and a mask;
all modules start at ``lora_rank``. Within a module the components most important in the last interval stay; one that
comes back starts with column of B zero, a fresh row of A, no momentum, and the mean of the factor's squared gradients.

Cost: one scoring pass (about one forward and backward pass over the data without weight gradients; two for the exact
alignment, a forward pass more for the exact loss drop); optimizer states for ``adaptive_max_rank``, one more fp32
number per factor element and an element-wise pass over the adapter per step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.methods import InitialAdapter, MethodTraits, ReturnRule, Sampling, Scores, ScoringContext
from llamafactory_adaptive.methods._running_stats import IntervalMean
from llamafactory_adaptive.options import option


@dataclass(frozen=True)
class TsqOptions:
    """Options of TsqLoRA, the YAML keys ``tsq_*``."""

    sampling: bool = option(True, "Choose training samples by quality; false trains on all of them.")
    reallocation: bool = option(
        True, "Move ranks between modules while training; false keeps every module at lora_rank."
    )
    norm_weight: float = option(1.0, "Weight of the gradient norm in the quality of a sample.", low=-100.0, high=100.0)
    loss_drop_weight: float = option(1.0, "Weight of the expected loss drop in the quality.", low=-100.0, high=100.0)
    alignment_weight: float = option(
        0.0,
        "Weight of the alignment with the mean gradient in the quality; alignments are measured only if it is not 0.",
        low=-100.0,
        high=100.0,
    )
    loss_drop: str = option(
        "first_order",
        "How the expected loss drop is computed: first_order takes eta |g|^2, exact measures it by one more forward "
        "pass.",
        choices=("first_order", "exact"),
    )
    step_size: float | None = option(
        None,
        "Step size eta with which tsq_loss_drop: exact measures the loss drop (default: learning_rate).",
        low=1e-12,
        high=1e3,
    )
    projection: int = option(
        1024,
        "Dimensions of the random projection by which alignments are estimated; 0 computes them exactly, by a "
        "second pass.",
        unit="dimensions",
        low=0,
        high=65_536,
    )
    temperature: float = option(0.7, "Temperature tau of the softmax over qualities.", low=1e-3, high=1e6)
    subset_ratio: float = option(
        0.7, "Share of the training set that is trained on between refreshes.", low=1e-6, high=1.0
    )
    clip_term: str = option(
        "loss",
        "Measure by which tsq_clip_quantile leaves samples out. Samples with wrong answers stand out by their loss "
        "more than by their gradient_norm.",
        choices=("loss", "gradient_norm"),
    )
    clip_quantile: float = option(
        1.0,
        "Samples whose loss (or gradient norm, by tsq_clip_term) lies above this quantile are left out.",
        low=0.01,
        high=1.0,
    )
    batch_size: int | None = option(
        None,
        "Samples per batch while scoring (default: per_device_train_batch_size).",
        unit="samples",
        low=1,
        high=65_536,
    )
    refresh_ratio: float = option(
        0.25, "Share of all optimizer steps between refreshes of subset and ranks.", low=1e-4, high=0.5
    )
    sensitivity: str = option(
        "weight_gradient",
        "How the sensitivity of a weight is measured: weight_gradient takes |w dL/dw|, fisher takes (dL/dw)^2.",
        choices=("weight_gradient", "fisher"),
    )
    beta: float = option(
        0.85,
        "Weight of each refresh interval in the sensitivity, relative to the interval after it; a larger value keeps "
        "ranks from jumping back and forth between refreshes.",
        low=0.0,
        high=1.0,
    )
    phi: str = option(
        "1",
        "Share of the budget that is spent: 1 spends all of it; quality spends between 0.5 and 1, more for a subset "
        "of higher mean quality.",
        choices=("1", "quality"),
    )

    def check(self) -> list[Problem]:
        """List options that leave nothing to do, have no effect, or contradict each other."""
        problems = self._idle()
        if not (self.sampling or self.reallocation):
            reason = "with tsq_reallocation: false nothing of the method is left"
            problems.append(Problem("tsq_sampling", False, reason, "adaptive_method: uniform"))
        if not self.sampling and self.phi == "quality":
            problems.append(Problem("tsq_phi", self.phi, "without sampling no quality is known", "tsq_phi: 1"))
        if not self.reallocation and self.phi == "quality":
            problems.append(Problem("tsq_phi", self.phi, "without reallocation ranks stay as they are", "tsq_phi: 1"))
        if self.sampling and not (self.norm_weight or self.loss_drop_weight or self.alignment_weight):
            reason = "all three weights are 0: every sample would be as good as any"
            problems.append(Problem("tsq_norm_weight", self.norm_weight, reason, "tsq_norm_weight: 1.0"))
        return problems

    def _idle(self) -> list[Problem]:
        """List options that were set but have no effect because of others."""
        rules = [
            (not self.sampling, _OF_SAMPLING, "with tsq_sampling: false no sample is chosen"),
            (not self.reallocation, OF_REALLOCATION, "with tsq_reallocation: false ranks stay as they are"),
            (self.clip_quantile == 1.0, ("clip_term",), "with tsq_clip_quantile: 1 nothing is left out"),
            (not self.alignment_weight, ("projection",), "with tsq_alignment_weight: 0 no alignment is measured"),
            (self.loss_drop != "exact", ("step_size",), "only tsq_loss_drop: exact takes a step"),
        ]
        return [
            Problem(f"tsq_{entry.name}", getattr(self, entry.name), reason, f"leaving tsq_{entry.name} out")
            for off, names, reason in rules
            for entry in fields(self)
            if off and entry.name in names and getattr(self, entry.name) != entry.default
        ]


_OF_SAMPLING = ("norm_weight", "loss_drop_weight", "alignment_weight", "loss_drop", "temperature", "subset_ratio",
                "clip_term", "clip_quantile", "batch_size")  # fmt: skip
OF_REALLOCATION = ("sensitivity", "beta")
_OF_THE_SAMPLES = tuple(
    entry.name for entry in fields(TsqOptions) if entry.name not in ("reallocation", "phi", *OF_REALLOCATION)
)


class Tsq:
    """The method registered as ``tsq``: dynamic, and static where ``reallocation`` is off."""

    Options: ClassVar[type[TsqOptions]] = TsqOptions
    concentration_advice: ClassVar[str] = ""
    initial_adapter: ClassVar[InitialAdapter] = InitialAdapter(None, "lora")
    return_rule: ClassVar[ReturnRule] = ReturnRule()
    shrinkage: ClassVar[None] = None
    orthogonality: ClassVar[None] = None

    def __init__(self, options: TsqOptions) -> None:
        self.options = options
        self.importance = IntervalMean()

    @property
    def traits(self) -> MethodTraits:
        """Return the strategy, ``reallocate`` or ``fixed``, and whether samples are chosen."""
        return MethodTraits(
            "reallocate" if self.options.reallocation else "fixed",
            samples=self.options.sampling,
            read_with_plan=_OF_THE_SAMPLES if self.options.sampling else (),
        )

    @property
    def refresh_ratio(self) -> float:
        return self.options.refresh_ratio

    @property
    def beta(self) -> float:
        return self.options.beta

    @property
    def sampling(self) -> Sampling:
        """Return the settings by which training samples are chosen."""
        o = self.options
        return Sampling(
            weights=(o.norm_weight, o.loss_drop_weight, o.alignment_weight),
            loss_drop=o.loss_drop,
            step_size=o.step_size,
            projection=o.projection,
            temperature=o.temperature,
            subset_ratio=o.subset_ratio,
            clip_term=o.clip_term,
            clip_quantile=o.clip_quantile,
            batch_size=o.batch_size,
            refresh_ratio=o.refresh_ratio,
            scales_budget=o.phi == "quality",
        )

    def measurement(self) -> None:
        """Return None: sensitivities are measured during training."""

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Return equal scores: without reallocation every module has the same rank."""
        return Scores({shape.name: 1.0 for shape in context.shapes})

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        return 1.0

    def observe(self, block: str, weights: Tensor, gradients: Tensor, live: Tensor | None) -> None:
        """Add ``|w g|`` or ``g^2`` to the interval's mean; both are zero for masked elements."""
        fisher = self.options.sensitivity == "fisher"
        self.importance.update(block, gradients.square_() if fisher else gradients.mul_(weights).abs_())

    def element_scores(self, block: str, weights: Tensor) -> Tensor:
        """Return the mean importance since the last allocation."""
        return self.importance.mean(block)

    def allocated(self) -> None:
        self.importance.clear()

    def state(self) -> dict[str, Tensor]:
        return self.importance.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.importance.load(state)
