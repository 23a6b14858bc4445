"""Methods that turn a model and data into ranks: one file each, found through the registry.

A static method scores modules once, before training. A dynamic method watches rank-1 components while they train and
scores those. Either is any class with the members of its protocol and an ``Options`` dataclass whose fields become the
YAML keys ``<method>_<field>``; there is nothing to inherit.
"""

from llamafactory_adaptive.methods._contract import (
    DynamicMethod,
    Orthogonality,
    ReallocatingMethod,
    Sampling,
    Scores,
    ScoringContext,
    StaticMethod,
    is_dynamic,
)
from llamafactory_adaptive.methods._registry import get_method, methods, nearest


__all__ = [
    "DynamicMethod",
    "Orthogonality",
    "ReallocatingMethod",
    "Sampling",
    "Scores",
    "ScoringContext",
    "StaticMethod",
    "get_method",
    "is_dynamic",
    "methods",
    "nearest",
]
