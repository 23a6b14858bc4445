"""ElaLoRA (arXiv 2504.00254): the least important ranks are pruned while training, and as many grow elsewhere.

The adapter is ``P diag(lambda) Q``, with P, Q ~ N(0, 0.02) and lambda 0. As in AdaLoRA an element's importance is
``s = |w dL/dw|``, smoothed to S and U, its score S * U, and a component's score the sum

    lambda's + mean over its column of P + mean over its row of Q

All modules start at ``lora_rank``. After a warm-up, at every ``adaptive_interval``, each module puts its k least
important components up. Of all these, over all modules, the b least important are pruned; the b most important give
their modules one component more each: a module whose least is still much needs more. Their number falls to none,

    b(t) = round(b (1 - ((t - t_i) / (t_f - t_i))^3))

by t_f, where ``adaptive_final_ratio`` of all steps are left, which train the final ranks. A new component has
directions of length 1 orthogonal to those in use, and no effect: its lambda is 0. The regulariser is the Frobenius
norm of Gram - I, weight 0.1.

Sources: the paper for score and phases; what the authors' released code does and is run with for the choice by k (2)
and b (4 over 72 modules), the schedule of b, the start of new components, the smoothing factors and the weight. Its
intervals are 50 to 200 steps; ours are those of all methods here.

What differs:

* Freed are budget units, which also may be parameters: the list of what was put up is walked from the most important
  on, and each module grows whose rank still fits, until none does. With ``adaptive_budget_unit: ranks`` b are pruned
  and b grow, as published. A module that was pruned and is reached gets its own component back, for no other.
* A module with one component puts it up too, though it cannot be pruned: as published it could never grow again.
* No rank exceeds ``adaptive_max_rank``, the rank of the tensors that train; as published there is no limit, and
  tensors change their shapes. Components that are not in use are masked; the regulariser leaves them out.
* A component that came into use at the last exchange is not put up at the next: its lambda starts at 0, and it would
  go before it had grown. As published it can.
* lambda of a new component is 0, not 1e-13; directions are orthogonal to each other, and exactly so to those in use,
  whatever these are (as published only if they are orthonormal); the optimizer's momenta start from 0, its squared
  gradients from their mean over the factor.
* b follows the number of modules by default; ``adaptive_min_rank`` above 1 is kept.

What the paper leaves open and the code settles has a key where a user may want it otherwise: ``elalora_candidates``,
``elalora_exchanged_ranks``, ``elalora_decay``, both smoothing factors, the regulariser's weight. How a new component
starts (length, direction, optimizer states) has no key: any start without effect serves the same end, and one with an
effect would make the loss jump at every exchange.

As lambda starts at 0, first updates are as small as AdaLoRA's at LoRA's scale: use a higher rate than for LoRA.

Cost: optimizer states and activations of ``adaptive_max_rank``; two numbers per adapter weight, fp32 unless
``statistics_dtype`` says otherwise, and a few element-wise passes over the adapter per step; at an exchange every
process holds the factors of modules that grow whole, in fp32, and orthogonalises their new rows on its CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.methods import MethodTraits, Orthogonality
from llamafactory_adaptive.methods._adalora_form import AdaloraForm
from llamafactory_adaptive.methods._running_stats import check_statistics_dtype, statistics_dtype
from llamafactory_adaptive.options import option
from llamafactory_adaptive.ranks.allocation import Bounds


_MODULES_PER_RANK = 18  # 4 ranks a time for 72 modules, in the authors' settings
Candidate = tuple[float, int, int]  # score, module, component


@dataclass(frozen=True)
class ElaloraOptions:
    """Options of ElaLoRA, the YAML keys ``elalora_*``."""

    exchanged_ranks: int | None = option(
        None,
        "Ranks b that are pruned at the first exchange, and expanded elsewhere (default: 1 for every 18 modules, the "
        "authors' ratio).",
        unit="ranks",
        low=1,
    )
    candidates: int = option(
        2,
        "Components k, the least important ones, that every module puts up at an exchange; it loses no more at once.",
        unit="components",
        low=1,
        high=64,
    )
    decay: str = option(
        "cubic",
        "How the number of exchanged ranks falls: cubic to none where ranks become final, none keeps it until then.",
        choices=("cubic", "none"),
    )
    beta1: float = option(
        0.85, "Decay rate of the running mean of the importance; a larger one smooths more.", low=0.0, high=0.9999
    )
    beta2: float = option(
        0.85, "Decay rate of the running deviation of the importance; a larger one smooths more.", low=0.0, high=0.9999
    )
    orthogonality_weight: float = option(
        0.1, "Weight of the orthogonality regulariser |Gram - I| in the loss.", low=0.0, high=1e6
    )
    statistics_dtype: str = statistics_dtype()

    def check(self) -> list[Problem]:
        """List decay rates that do not go with the type of the statistics."""
        return check_statistics_dtype("elalora", self.statistics_dtype, beta1=self.beta1, beta2=self.beta2)


class Elalora(AdaloraForm):
    """The method registered as ``elalora``."""

    Options: ClassVar[type[ElaloraOptions]] = ElaloraOptions
    traits: ClassVar[MethodTraits] = MethodTraits("exchange")

    def __init__(self, options: ElaloraOptions) -> None:
        super().__init__(options)
        self.options = options

    @property
    def orthogonality(self) -> Orthogonality | None:
        """Return the regulariser over the components in use; None at weight 0."""
        over_all = super().orthogonality
        return None if over_all is None else replace(over_all, in_use=True)

    def exchange(
        self,
        scores: Sequence[Sequence[float]],
        used: Sequence[Sequence[bool]],
        fresh: Sequence[Sequence[bool]],
        bounds: Bounds,
        progress: float,
    ) -> list[list[bool]]:
        """Remove the least important components put up, and expand the modules of the most important ones."""
        judged = [[on and not new for on, new in zip(*rows, strict=True)] for rows in zip(used, fresh, strict=True)]
        candidates = put_up(scores, judged, self.options.candidates)
        masks = prune(candidates, used, bounds, self._count(len(used), progress))
        return expand(candidates, scores, used, masks, bounds)

    def _count(self, modules: int, progress: float) -> int:
        """Return b, the number of components to prune."""
        if progress >= 1.0:
            return 0
        b = self.options.exchanged_ranks or max(1, round(modules / _MODULES_PER_RANK))
        return b if self.options.decay == "none" else round(b * (1.0 - progress * progress * progress))

    def new_directions(self, kept: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Draw rows of length 1 that are orthogonal to those kept and to each other."""
        known = torch.linalg.qr(kept.double().mT).Q
        drawn = torch.randn(kept.shape[1], count, generator=generator).double()
        for _ in range(2):  # once is not exact where little is left of a row
            drawn = torch.linalg.qr(drawn - known @ (known.mT @ drawn)).Q
        return drawn.mT.to(kept)

    def forget(self, block: str, fresh: Tensor) -> None:
        self.importance.forget(block, fresh)


def put_up(scores: Sequence[Sequence[float]], judged: Sequence[Sequence[bool]], count: int) -> list[Candidate]:
    """List the ``count`` least important components of every module among those judged, the most important first."""
    candidates = []
    for module, (row, flags) in enumerate(zip(scores, judged, strict=True)):
        own = sorted((score, index) for index, (score, on) in enumerate(zip(row, flags, strict=True)) if on)
        candidates += [(score, module, index) for score, index in own[:count]]
    return sorted(candidates, key=lambda one: (-one[0], *one[1:]))


def prune(
    candidates: Sequence[Candidate], used: Sequence[Sequence[bool]], bounds: Bounds, count: int
) -> list[list[bool]]:
    """Return the components that stay in use when the ``count`` least important candidates go."""
    masks = [list(row) for row in used]
    for _, module, index in sorted(candidates):
        if count and sum(masks[module]) > bounds.lower[module]:
            masks[module][index] = False
            count -= 1
    return masks


def expand(
    candidates: Sequence[Candidate],
    scores: Sequence[Sequence[float]],
    used: Sequence[Sequence[bool]],
    masks: list[list[bool]],
    bounds: Bounds,
) -> list[list[bool]]:
    """Add a component to the module of each candidate in turn, again and again, as long as one fits.

    Args:
        candidates: the most important ones first.
        scores: score of every component, by module.
        used: components in use before any were pruned.
        masks: components that are still in use; it is changed.
        bounds: budget, and the most components of a module.
    """
    left, grows = bounds.budget - bounds.cost([sum(row) for row in masks]), True
    while grows:
        grows = False
        for _, module, _ in candidates:
            if bounds.costs[module] <= left and sum(masks[module]) < bounds.upper[module]:
                masks[module][_next(scores[module], used[module], masks[module])] = grows = True
                left -= bounds.costs[module]
    return masks


def _next(scores: Sequence[float], used: Sequence[bool], mask: Sequence[bool]) -> int:
    """Return the component to add to a module: the best of those just pruned from it, else the first not in use."""
    off = [index for index, on in enumerate(mask) if not on]
    return min(off, key=lambda index: (not used[index], -scores[index] if used[index] else 0.0))
