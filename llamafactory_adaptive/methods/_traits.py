"""Traits that a method declares, and the members that they require. Without torch."""

from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.ranks.search_config import STRATEGIES, Strategy


_EVERY = ("Options", "concentration_advice")
_STATIC = ("measurement", "score")
_DYNAMIC = (
    "initial_adapter",
    "return_rule",
    "shrinkage",
    "orthogonality",
    "position",
    "observe",
    "element_scores",
    "state",
    "load",
)
_OBSERVING = ("observe", "element_scores")
_COMPONENTWISE = ("importance_of", "observe_components", "component_scores")
_REALLOCATING = ("refresh_ratio", "beta", "allocated")
_EXCHANGING = ("exchange", "new_directions", "forget")
_RELATIVE = ("log_importance", "set_typical")


@dataclass(frozen=True)
class MethodTraits:
    """The kind of a method. The registry checks that a class has the members that its traits require.

    Attributes:
        strategy: how ranks change while training. ``fixed``: not at all; the method is a :class:`StaticMethod`.
            ``prune``: over-ranked at first, the globally best components stay under a falling budget; a
            :class:`DynamicMethod`. ``reallocate``: module ranks proportional to the mean score of their elements in
            use, discounted over refreshes (a component's first interval does not count), under a constant budget; a
            :class:`ReallocatingMethod`. ``exchange``: equal at first, and under a constant budget the method itself
            chooses which components give way to new ones; an :class:`ExchangingMethod`.
        probes: whether gradients are observed by extra passes; a :class:`ProbingMethod`.
        relative: whether scores depend on the typical importance of a kind; a :class:`RelativeMethod`.
        samples: whether training data is chosen by quality; a :class:`SamplingMethod`.
        sample_moment: what a method without lambda observes in place of the step's gradient g: 0 for g itself, 1 or 2
            for the mean of this order over samples, ``(E|g_i|^order)^(1/order)`` per element.
        componentwise: whether only means over the elements of a component are observed, so that nothing is kept per
            element; a :class:`ComponentwiseMethod`.
        spectral: whether the factors are rotated to the form of their singular values, and components scored by
            these, rather than by what is observed; ranks are then chosen once. With ``prune``, without lambda; a
            :class:`SpectralMethod`.
        scales_by_start: whether the scale is ``lora_alpha`` over the rank that modules start at, rather than over
            ``lora_rank``; read where ranks are pruned.
        read_with_plan: options that are read when ranks come from ``adaptive_plan``, as by a method that still chooses
            samples.
        only_with_plan: those of them that are not read otherwise.
        triplets_with_plan: whether ranks that come from ``adaptive_plan`` are trained as ``P diag(lambda) Q``, from
            the method's initial adapter and with its regulariser, rather than as plain LoRA; a :class:`DynamicMethod`.
    """

    strategy: Strategy
    probes: bool = False
    relative: bool = False
    samples: bool = False
    sample_moment: int = 0
    componentwise: bool = False
    spectral: bool = False
    scales_by_start: bool = False
    read_with_plan: tuple[str, ...] = ()
    only_with_plan: tuple[str, ...] = ()
    triplets_with_plan: bool = False

    @property
    def dynamic(self) -> bool:
        """Tell whether ranks are found during training."""
        return self.strategy != "fixed"

    @property
    def lowest_rank(self) -> int:
        """Return the lowest ``adaptive_min_rank``: 1 where modules grow by the scores of components that they have."""
        return 1 if self.strategy in ("reallocate", "exchange") else 0

    def demanded(self) -> tuple[str, ...]:
        """List the members that a method with these traits must have."""
        return (
            *_EVERY,
            *(name for name in self._of_the_adapter() if not (self._sees_no_elements and name in _OBSERVING)),
            *(_COMPONENTWISE if self.componentwise else ()),
            *(() if self.dynamic else _STATIC),
            *(_REALLOCATING if self.strategy == "reallocate" else ()),
            *(_EXCHANGING if self.strategy == "exchange" else ()),
            *(("rotate",) if self.spectral else ()),
            *(("path",) if self.probes else ()),
            *(_RELATIVE if self.relative else ()),
            *(("sampling",) if self.samples else ()),
        )

    @property
    def _sees_no_elements(self) -> bool:
        return self.spectral or self.componentwise

    def _of_the_adapter(self) -> tuple[str, ...]:
        return _DYNAMIC if self.dynamic or self.triplets_with_plan else ()


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
    if traits.componentwise and (traits.spectral or traits.strategy == "exchange"):
        return [f"with componentwise no elements are observed, which its traits ({_words(traits)}) need"]
    missing = [name for name in traits.demanded() if not hasattr(method, name)]
    return [f"it lacks {', '.join(missing)}, which its traits ({_words(traits)}) demand"] if missing else []


def _words(traits: MethodTraits) -> str:
    flags = [name for name in ("probes", "relative", "samples", "componentwise", "spectral") if getattr(traits, name)]
    return ", ".join([f"strategy {traits.strategy!r}", *flags])
