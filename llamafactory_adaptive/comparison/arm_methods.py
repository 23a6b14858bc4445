"""What the method of an arm asks of the settings that it shares with all others."""

from collections.abc import Iterable, Mapping
from typing import Any

from llamafactory_adaptive.calibration.measurement import needs_rows
from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.key_checks import CALIBRATION_KEYS, PLACEMENT_KEYS
from llamafactory_adaptive.methods import get_method, make_method, methods
from llamafactory_adaptive.options import check_fields


MIN_RANK = "adaptive_min_rank"
_PLAN, _METHOD = "adaptive_plan", "adaptive_method"
_BOUNDS = (MIN_RANK, "adaptive_max_rank")
# What decides ranks or starts whatever the method is, and what a budget counts: with it from the YAML an arm would be
# that of its method by name alone, or have another number of parameters than the others.
_OF_NO_METHOD = (_PLAN, "adaptive_init", "adaptive_granularity", "adaptive_budget_unit")
_GAMMA = "adaptive_init_gamma"  # goes with adaptive_init, and is refused without it, also at its default


def raised_min_rank(run: Mapping[str, Any]) -> int | None:
    """Return the lowest rank that a run's method can do with, where the run asks for a lower one; None otherwise.

    Args:
        run: settings of an adaptive run, which need not be checked yet.
    """
    common, method = _chosen(run)
    if method is None or common[_PLAN] is not None:
        return None
    lowest: int = method.traits.lowest_rank
    return lowest if common[MIN_RANK] < lowest else None


def keys_that_stay(given: Mapping[str, Any], arm: Mapping[str, Any], own_keys: Iterable[str]) -> set[str]:
    """Choose the adaptive keys of the YAML that hold for an arm, too.

    These are the bounds of ranks; calibration keys where the arm reads them; and where the YAML names the method of
    the arm, all others but for those of no method. Where the YAML gives the ranks, its keys were meant for them.

    Args:
        given: settings of the YAML.
        arm: settings of an adaptive arm, which need not be checked yet.
        own_keys: those of the YAML's keys that are the plugin's.
    """
    same = arm.get(_METHOD) == given.get(_METHOD) and (given.get(_PLAN) is None or _PLAN in arm)
    if not same:
        return {*_BOUNDS, *calibration_keys_of(arm)}
    return {*own_keys} - {*keys_of_no_method(given)}


def keys_of_no_method(given: Mapping[str, Any]) -> list[str]:
    """List the keys that the YAML's own arm has, and others where they set them; none that changes nothing."""
    defaults, _ = check_fields(AdaptiveArguments, "", {})
    changed = [key for key in _OF_NO_METHOD if given.get(key, defaults[key]) != defaults[key]]
    return [*changed, _GAMMA] if given.get(_GAMMA) is not None else changed


def keys_left_to_yaml(given: Mapping[str, Any], own_keys: Iterable[str]) -> list[str]:
    """List the adaptive keys of the YAML that not even arms of its own method take from it."""
    stay = keys_that_stay(given, {_METHOD: given.get(_METHOD)}, own_keys)
    return [key for key in own_keys if key not in stay and key != _METHOD]


def calibration_keys_of(run: Mapping[str, Any]) -> tuple[str, ...]:
    """List the calibration keys that a run reads: of rows where it draws some, of memory where it measures at all.

    Args:
        run: settings of an adaptive run, which need not be checked yet.
    """
    common, method = _chosen(run)
    if method is None or method.traits.dynamic:
        return ()
    if common["adaptive_init"] != "default":
        return CALIBRATION_KEYS
    measurement = None if common[_PLAN] is not None else method.measurement()
    if needs_rows(measurement):
        return CALIBRATION_KEYS
    return () if measurement is None else PLACEMENT_KEYS


def _chosen(run: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Read the keys that hold for every method, and make the run's method; None where no such method is there."""
    common, _ = check_fields(AdaptiveArguments, "", run)
    if (name := common[_METHOD]) not in methods():
        return common, None
    options, _ = check_fields(get_method(name).Options, f"{name}_", run)
    return common, make_method(name, options)
