"""Plans that earlier versions wrote: options that did not exist then get the values that runs had in their place."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamafactory_adaptive.methods import get_method, methods
from llamafactory_adaptive.options import with_earlier_values
from llamafactory_adaptive.ranks.plan import RankPlan


def with_all_options(plan: RankPlan) -> RankPlan:
    """Add the options that a plan does not hold, of the method of its ranks and of the one that chose its samples."""
    sampling = plan.provenance.get("sampling")
    provenance = {**plan.provenance, "sampling": _all_flat(sampling)} if sampling else plan.provenance
    return replace(plan, options=_all(plan.method, plan.options), provenance=provenance)


def _all(method: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    return with_earlier_values(get_method(method).Options, stored) if method in methods() else dict(stored)


def _all_flat(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Complete options by YAML key, beside the key of the method."""
    method = sampling["adaptive_method"]
    stored = {key.removeprefix(f"{method}_"): value for key, value in sampling.items() if key != "adaptive_method"}
    return {"adaptive_method": method, **{f"{method}_{key}": value for key, value in _all(method, stored).items()}}
