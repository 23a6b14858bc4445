"""Names of modules, and the patterns over them in ``rank_pattern`` and ``alpha_pattern``, without regular expressions.

PEFT and vLLM pass every key of these patterns to ``re``. An untrusted key may be an expression whose matching never
ends, so only names are accepted: ``q_proj``, ``layers.3.q_proj``, or ``^model.layers.3.q_proj`` for the whole name. As
in PEFT, the first key that is the module's name, or ends it after a dot, applies.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any


LONGEST = 512
_NAME = re.compile(r"[\w\-]+(?:\.[\w\-]+)*")
_KEY = re.compile(r"\^?[\w\-]+(?:\\?\.[\w\-]+)*\$?")
# A pattern names modules; one that has many more keys than there are modules only costs time.
_KEYS_PER_MODULE, _FEW_KEYS = 4, 256


def module_type(name: str) -> str:
    """Return the last word of a full module name: ``up_proj`` for ``model.layers.3.mlp.up_proj``."""
    return name.rpartition(".")[2]


def layer_and_type(name: str) -> tuple[int | None, str]:
    """Return layer number and type of a full module name: (3, ``up_proj``) for ``model.layers.3.mlp.up_proj``."""
    layer = re.search(r"\.(\d+)\.", name)
    return (int(layer.group(1)) if layer else None), module_type(name)


def layer_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return a key that sorts names of modules as a model has its layers: number 2 before number 10."""
    words = name.split(".")
    return tuple((word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words)


def is_routed_expert(name: str) -> bool:
    """Tell whether a full module name is that of one expert of many: ``model.layers.3.mlp.experts.7.up_proj``."""
    return re.search(r"\.experts\.\d+\.", name) is not None


def is_module_name(name: object) -> bool:
    """Tell whether ``name`` is a valid module name: words with dots between them."""
    return isinstance(name, str) and len(name) <= LONGEST and _NAME.fullmatch(name) is not None


def is_plain_key(key: object) -> bool:
    """Tell whether a key of a pattern is a module name or the end of one, maybe with ``^``, ``$`` or ``\\.`` in it."""
    return isinstance(key, str) and len(key) <= LONGEST and _KEY.fullmatch(key) is not None


def too_many_keys(pattern: Mapping[str, object], modules: int) -> bool:
    """Tell whether a pattern has more keys than any adapter of that many modules needs."""
    return len(pattern) > max(_FEW_KEYS, _KEYS_PER_MODULE * modules)


class NamePattern:
    """Index of a pattern's keys by module name; a look-up takes as many steps as the name has words."""

    def __init__(self, keys: Iterable[str]) -> None:
        self.exact: dict[str, tuple[int, str]] = {}
        self.ends: dict[str, tuple[int, str]] = {}
        for index, key in enumerate(keys):
            table = self.exact if key.startswith("^") else self.ends
            table.setdefault(key.removeprefix("^").removesuffix("$").replace("\\.", "."), (index, key))

    def key_of(self, name: str) -> str | None:
        """Find the first key that is ``name`` or ends it after a dot; None if there is none."""
        words = name.split(".")
        ends = (".".join(words[start:]) for start in range(len(words)))
        matches = [self.ends[end] for end in ends if end in self.ends]
        matches += [self.exact[name]] if name in self.exact else []
        return min(matches)[1] if matches else None


class PatternValues:
    """Values of a pattern, which are looked up by the full names of modules."""

    def __init__(self, pattern: Mapping[str, Any]) -> None:
        self.pattern, self.keys = pattern, NamePattern(pattern)

    def value_of(self, name: str, default: Any) -> Any:
        """Return the value of the first key that applies to a module, or ``default``."""
        key = self.keys.key_of(name)
        return default if key is None else self.pattern[key]
