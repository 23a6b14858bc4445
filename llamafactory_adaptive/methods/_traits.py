"""Traits that a method declares, and the members that they require. Without torch."""

from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.ranks.schedule import STRATEGIES, Strategy


_EVERY = ("Options", "concentration_advice")
_STATIC = ("measurement", "score")
_DYNAMIC = ("initial_lambda", "orthogonality", "position", "observe", "element_scores", "state", "load")
_REALLOCATING = ("refresh_ratio", "beta", "allocated")


@dataclass(frozen=True)
class MethodTraits:
    """The kind of a method. The registry checks that a class has the members that its traits require.

    Attributes:
        strategy: how ranks change while training. ``fixed``: not at all; the method is a :class:`StaticMethod`.
            ``prune``: over-ranked at first, the globally best components stay under a falling budget; a
            :class:`DynamicMethod`. ``reallocate``: module ranks proportional to the mean score of their elements in
            use, discounted over refreshes (a component's first interval does not count), under a constant budget; a
            :class:`ReallocatingMethod`.
        probes: whether gradients are observed by extra passes; a :class:`ProbingMethod`.
        samples: whether training data is chosen by quality; a :class:`SamplingMethod`.
        unused_with_plan: options that are not read when ranks come from ``adaptive_plan``, where the method still
            chooses samples.
        sample_moment: what a method without lambda observes in place of the step's gradient g: 0 for g itself, 1 or 2
            for the mean of this order over samples, ``(E|g_i|^order)^(1/order)`` per element.
    """

    strategy: Strategy
    probes: bool = False
    samples: bool = False
    unused_with_plan: tuple[str, ...] = ()
    sample_moment: int = 0

    @property
    def dynamic(self) -> bool:
        """Tell whether ranks are found during training."""
        return self.strategy != "fixed"

    def demanded(self) -> tuple[str, ...]:
        """List the members that a method with these traits must have."""
        return (
            *_EVERY,
            *(_DYNAMIC if self.dynamic else _STATIC),
            *(_REALLOCATING if self.strategy == "reallocate" else ()),
            *(("path",) if self.probes else ()),
            *(("sampling",) if self.samples else ()),
        )


def trait_faults(method: Any) -> list[str]:
    """List in words what a method lacks of the members that its traits require.

    Args:
        method: method with its options, since traits may depend on them.
    """
    traits = getattr(method, "traits", None)
    if not isinstance(traits, MethodTraits):
        return [f"it has no traits: declare traits = MethodTraits(strategy), with one of {', '.join(STRATEGIES)}"]
    if traits.strategy not in STRATEGIES:
        return [f"its strategy is {traits.strategy!r}, and must be one of {', '.join(STRATEGIES)}"]
    missing = [name for name in traits.demanded() if not hasattr(method, name)]
    return [f"it lacks {', '.join(missing)}, which its traits ({_words(traits)}) demand"] if missing else []


def _words(traits: MethodTraits) -> str:
    flags = [name for name in ("probes", "samples") if getattr(traits, name)]
    return ", ".join([f"strategy {traits.strategy!r}", *flags])
