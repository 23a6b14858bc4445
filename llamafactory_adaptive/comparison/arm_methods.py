"""What the method of an arm asks of the settings that it shares with all others."""

from collections.abc import Iterable, Mapping
from typing import Any

from llamafactory_adaptive.calibration.measurement import needs_rows
from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.key_checks import CALIBRATION_KEYS, PLACEMENT_KEYS
from llamafactory_adaptive.methods import get_method, make_method, methods
from llamafactory_adaptive.options import check_fields


MIN_RANK, PLAN, METHOD = "adaptive_min_rank", "adaptive_plan", "adaptive_method"
_BOUNDS = (MIN_RANK, "adaptive_max_rank")
# What decides ranks or starts whatever the method is, and what a budget counts: with it from the YAML an arm would be
# that of its method by name alone, or have another number of parameters than the others.
_OF_YAML_ALONE = (PLAN, "adaptive_init", "adaptive_init_gamma", "adaptive_granularity", "adaptive_budget_unit")


def raised_min_rank(run: Mapping[str, Any]) -> int | None:
    """Return the lowest rank that a run's method can do with, where the run asks for a lower one; None otherwise.

    Args:
        run: settings of an adaptive run, which need not be checked yet.
    """
    common, method = _chosen(run)
    if method is None or common[PLAN] is not None:
        return None
    lowest: int = method.traits.lowest_rank
    return lowest if common[MIN_RANK] < lowest else None


def keys_that_stay(given: Mapping[str, Any], arm: Mapping[str, Any], own_keys: Iterable[str]) -> set[str]:
    """Choose the adaptive keys of the YAML that hold for an arm, too.

    These are the bounds of ranks; calibration keys where the arm reads them; and where the YAML names the method of
    the arm, all others but for those that the YAML's own arm alone has.

    Args:
        given: settings of the YAML.
        arm: settings of an adaptive arm, which need not be checked yet.
        own_keys: those of the YAML's keys that are the plugin's.
    """
    stay = set(_BOUNDS)
    if arm.get(METHOD) == given.get(METHOD):
        stay |= set(own_keys) - {*of_yaml_alone(given), *CALIBRATION_KEYS}
    run = {**{key: given[key] for key in stay if key in given}, **arm}
    common, method = _chosen(run)
    if method is not None and common[PLAN] is None:
        stay -= {f"{common[METHOD]}_{option}" for option in method.traits.only_with_plan}
    return stay | set(calibration_keys_of(run))


def of_yaml_alone(given: Mapping[str, Any]) -> list[str]:
    """List the keys of the YAML that no arm but the YAML's own has; one at its default means nothing anywhere."""
    defaults, _ = check_fields(AdaptiveArguments, "", {})
    return [key for key in _OF_YAML_ALONE if given.get(key, defaults[key]) != defaults[key]]


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
    measurement = None if common[PLAN] is not None else method.measurement()
    if needs_rows(measurement):
        return CALIBRATION_KEYS
    return () if measurement is None else PLACEMENT_KEYS


def _chosen(run: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Read the keys that hold for every method, and make the run's method; None where no such method is there."""
    common, _ = check_fields(AdaptiveArguments, "", run)
    if (name := common[METHOD]) not in methods():
        return common, None
    options, _ = check_fields(get_method(name).Options, f"{name}_", run)
    return common, make_method(name, options)
