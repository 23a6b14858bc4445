"""PEFT's look-up of ranks and targets by module name, in time that grows as the number of modules does.

While PEFT adds an adapter to a model, it tries the keys of ``rank_pattern`` and ``alpha_pattern`` on every target as
regular expressions, and every target on all other modules as the end of a name. That is quadratic, and beyond the 512
expressions that ``re`` keeps each trial compiles one anew: 88 s for 2,100 targets, hours for the experts of a large
model. Here all names are resolved once, and PEFT finds one entry for each by its full name. What it decides is the
same, but that a dot in a name is a dot.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from peft.tuners.lora import LoraModel
from torch import nn

from llamafactory_adaptive.ranks.module_names import NamePattern, is_plain_key


MANY = 64  # names in a config; PEFT's own look-up is fast below


class _ByFullName(dict[str, Any]):
    """Values by full name: PEFT finds no key to try as an expression, and then looks up the module's own name."""

    def keys(self) -> Any:
        return {}.keys()


class _Targets(frozenset[str]):
    """Full names of targets: PEFT asks whether a module is one, and finds no end of a name to try on all others.

    It is true even if empty, so that PEFT refuses a model without a target as it does otherwise; ``given`` is shown.
    """

    given: Any = ()

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return repr(self.given)


def look_names_up_once() -> None:
    """Make PEFT resolve the names of large LoRA configs once per adapter, in this process and from now on."""
    if not hasattr(LoraModel.inject_adapter, "__wrapped__"):
        LoraModel.inject_adapter = _with_resolved_names(LoraModel.inject_adapter)


def _with_resolved_names(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def inject_adapter(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with names_resolved(tuner.peft_config[adapter_name], model):
            original(tuner, model, adapter_name, *args, **kwargs)

    return inject_adapter


@contextmanager
def names_resolved(config: Any, model: nn.Module) -> Iterator[None]:
    """Replace patterns and targets of a LoraConfig, if they are many, by their matches in ``model`` for the context.

    PEFT would condense a long list of targets to ends of names; here the config keeps the names that it was given.
    """
    before = {key: getattr(config, key) for key in ("rank_pattern", "alpha_pattern", "target_modules")}
    if max(map(_count, before.values())) < MANY:
        yield
        return
    names = [name for name, _ in model.named_modules()]
    try:
        config.rank_pattern = _matches(config.rank_pattern, names)
        config.alpha_pattern = _matches(config.alpha_pattern, names)
        config.target_modules = _targets(config, names)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def _count(names: object) -> int:
    return len(names) if isinstance(names, (dict, list, set)) else 0


def _matches(pattern: Mapping[str, Any], names: list[str]) -> Mapping[str, Any]:
    """Return the values by full name; the pattern itself where a key is an expression."""
    if not all(map(is_plain_key, pattern)):
        return pattern
    keys = NamePattern(pattern)
    found = ((name, keys.key_of(name)) for name in names)
    return _ByFullName({name: pattern[key] for name, key in found if key is not None})


def _targets(config: Any, names: list[str]) -> Any:
    """Return the full names of all targets; what is given where it is an expression, or further rules hold."""
    given = config.target_modules
    limits = ("exclude_modules", "layers_to_transform", "layers_pattern")
    if not isinstance(given, (list, set)) or any(getattr(config, key, None) for key in limits):
        return given
    ends = set(given)
    targets = _Targets(name for name in names if not ends.isdisjoint(_ends(name)))
    targets.given = given
    return targets


def _ends(name: str) -> Iterator[str]:
    """List a name and what follows each of its dots."""
    words = name.split(".")
    return (".".join(words[start:]) for start in range(len(words)))
