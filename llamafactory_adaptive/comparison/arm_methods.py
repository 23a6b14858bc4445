"""What the method of an arm asks of the settings that it shares with all others."""

from collections.abc import Mapping
from typing import Any

from llamafactory_adaptive.calibration.measurement import needs_rows
from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.config.key_checks import CALIBRATION_KEYS, PLACEMENT_KEYS
from llamafactory_adaptive.methods import get_method, make_method, methods
from llamafactory_adaptive.options import check_fields


MIN_RANK = "adaptive_min_rank"


def raised_min_rank(run: Mapping[str, Any]) -> int | None:
    """Return the lowest rank that a run's method can do with, where the run asks for a lower one; None otherwise.

    Args:
        run: settings of an adaptive run, which need not be checked yet.
    """
    common, method = _chosen(run)
    if method is None or common["adaptive_plan"] is not None:
        return None
    lowest: int = method.traits.lowest_rank
    return lowest if common[MIN_RANK] < lowest else None


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
    measurement = None if common["adaptive_plan"] is not None else method.measurement()
    if needs_rows(measurement):
        return CALIBRATION_KEYS
    return () if measurement is None else PLACEMENT_KEYS


def _chosen(run: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """Read the keys that hold for every method, and make the run's method; None where no such method is there."""
    common, _ = check_fields(AdaptiveArguments, "", run)
    if (name := common["adaptive_method"]) not in methods():
        return common, None
    options, _ = check_fields(get_method(name).Options, f"{name}_", run)
    return common, make_method(name, options)
