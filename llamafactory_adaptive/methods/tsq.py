"""TsqLoRA (arXiv 2509.18585): data-quality sampling joined with sensitivity-driven rank reallocation.

Quality of a training sample, each term z-scored over the training set:

    Q_i = a1 |g_i| + a2 (l_i(theta) - l_i(theta - eta g_i)) + a3 <g_i, mean g> / |mean g|

g_i is the gradient of the sample's mean token loss over the LoRA factors. Training draws from a subset S, chosen
without replacement by p_i = softmax(Q_i / tau). Ranks follow the sensitivity of a module's factors,

    S_m = E |W (.) dL/dW|, mean over the elements in use;  r_m = S_m / sum S * phi(Q(S)) * R0.

What differs, since no full text is public: what second-hand accounts print clearly is the default, what they leave
open is a key.

* ``gradient_term``: accounts print the first term as the norm or as its square. The default is the norm: to first
  order the square is the second term over again (the same z-scores), so that a1 and a2 would weigh one thing.
* ``draws``: accounts also draw batches from S by p, and do not say how S is formed. Here S is drawn by p, which would
  then count twice: by default each of S comes once a turn. ``subset_ratio: 1``, ``draws: quality`` is p alone, once.
* ``sensitivity_over``: accounts print the expectation over samples of ``|w g_i|``, which is the default: per element
  the sum of ``|w s_i|`` over all samples of a step, s_i what sample i adds to the step's gradient, so that a sample
  weighs as much as its tokens do in the loss. ``step`` takes ``|w g|`` of the step's gradient: opposed samples cancel.
* ``refresh_quality``: optional in the accounts, and off. Samples are otherwise scored once, before the first step,
  when B is zero: ``|g_i|`` is then the gradient of the B factors.
* The second term is eta |g_i|^2 unless ``loss_drop: exact``; the third is ours, as are the z-scores, the draw without
  replacement, phi (1, so that the budget holds; ``quality`` is the mean place of S in the quality order, mapped to
  [0.5, 1]), the refresh every ``refresh_ratio`` of all steps, and the smoothing of S_m: E is the mean over all steps
  of a refresh interval, S_m / sum S is taken per interval, and earlier intervals count ``beta`` times as much as the
  next. A component that came back does not count in its first interval: its B starts at zero, and a module would
  look insensitive for having grown.
* ``clusters`` and ``min_cluster_share`` are ours: choosing by quality can starve a kind of data. With a floor S takes
  each cluster's first draws up to it, then the first of all others: within a cluster inclusion still follows p.

The adapter is plain LoRA with live rank ``adaptive_max_rank`` and a mask; all modules start at ``lora_rank``. Within a
module the components most important in the last interval stay; one that comes back starts with column of B zero, a
fresh row of A, no momentum, and the mean of the factor's squared gradients.

Cost: one scoring pass (about one forward and backward pass over the data without weight gradients; two for the exact
alignment, a forward pass more for the exact loss drop), with ``refresh_quality`` one more before every refresh;
optimizer states for ``adaptive_max_rank``, and an element-wise pass over the adapter per step. ``sensitivity_over:
samples`` computes the factors' weight gradients a second time in each backward pass, sample by sample, holds one more
fp32 number per factor element and exchanges them once a step.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from llamafactory_adaptive.methods import InitialAdapter, MethodTraits, ReturnRule, Sampling, Scores, ScoringContext
from llamafactory_adaptive.methods._running_stats import IntervalMean
from llamafactory_adaptive.methods._tsq_options import OF_THE_SAMPLES, TsqOptions


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
        """Return the strategy, ``reallocate`` or ``fixed``, whether samples are chosen, and what is observed."""
        return MethodTraits(
            "reallocate" if self.options.reallocation else "fixed",
            samples=self.options.sampling,
            componentwise=self.options.reallocation,
            sample_moment=self._order if self.options.sensitivity_over == "samples" else 0,
            read_with_plan=OF_THE_SAMPLES if self.options.sampling else (),
        )

    @property
    def _order(self) -> int:
        """Return the power of gradients in a sensitivity."""
        return 2 if self.options.sensitivity == "fisher" else 1

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
            squared_norm=o.gradient_term == "squared_norm",
            draws_by_quality=o.draws == "quality",
            refresh_quality=o.refresh_quality,
            clusters=o.clusters,
            min_cluster_share=o.min_cluster_share,
        )

    def measurement(self) -> None:
        """Return None: sensitivities are measured during training."""

    def score(self, statistics: Mapping[str, Tensor], context: ScoringContext) -> Scores:
        """Return equal scores: without reallocation every module has the same rank."""
        return Scores({shape.name: 1.0 for shape in context.shapes})

    def position(self, seed: int, step: int, micro_batch: int) -> float:
        return 1.0

    def importance_of(self, weights: Tensor, gradients: Tensor) -> Tensor:
        """Compute ``|w g|`` or ``g^2``; both are zero for masked elements."""
        return gradients.square_() if self._order == 2 else gradients.mul_(weights).abs_()

    def observe_components(self, block: str, importance_Mr: Tensor, live_Mr: Tensor | None) -> None:
        """Add what components have to the interval's mean."""
        self.importance.update(block, importance_Mr)

    def component_scores(self, block: str) -> Tensor:
        """Return the mean importance since the last allocation."""
        return self.importance.mean(block)

    def allocated(self) -> None:
        self.importance.clear()

    def state(self) -> dict[str, Tensor]:
        return self.importance.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.importance.load(state)
