"""Methods that turn a model and data into ranks: one file each, found through the registry.

A static method scores modules once, before training. A dynamic method watches rank-1 components while they train and
scores those. Either is any class with the members of its protocol and an ``Options`` dataclass whose fields become the
YAML keys ``<method>_<field>``; there is nothing to inherit. Its ``traits`` say which protocol it follows.
"""

from llamafactory_adaptive.methods._adapter_form import InitialAdapter, Orthogonality, ReturnRule, Shrinkage
from llamafactory_adaptive.methods._contract import (
    ComponentwiseMethod,
    DynamicMethod,
    ExchangingMethod,
    ProbingMethod,
    ReallocatingMethod,
    RelativeMethod,
    SamplingMethod,
    Scores,
    ScoringContext,
    SearchingMethod,
    SpectralMethod,
    StaticMethod,
)
from llamafactory_adaptive.methods._registry import get_method, is_dynamic, make_method, methods, nearest
from llamafactory_adaptive.methods._sampling import Sampling
from llamafactory_adaptive.methods._traits import MethodTraits
from llamafactory_adaptive.ranks.search_config import Strategy


__all__ = [
    "ComponentwiseMethod",
    "DynamicMethod",
    "ExchangingMethod",
    "InitialAdapter",
    "MethodTraits",
    "Orthogonality",
    "ProbingMethod",
    "ReallocatingMethod",
    "RelativeMethod",
    "ReturnRule",
    "Sampling",
    "SamplingMethod",
    "Scores",
    "ScoringContext",
    "SearchingMethod",
    "Shrinkage",
    "SpectralMethod",
    "StaticMethod",
    "Strategy",
    "get_method",
    "is_dynamic",
    "make_method",
    "methods",
    "nearest",
]
