"""Plans that earlier versions wrote: options that did not exist then get the values that runs had in their place."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from llamafactory_adaptive.config.run_config import AdaptiveConfig
from llamafactory_adaptive.methods import get_method, make_method, methods
from llamafactory_adaptive.options import completed, contradictions, with_earlier_values
from llamafactory_adaptive.planning.compatibility import check_same_run
from llamafactory_adaptive.ranks.plan import RankPlan


def check_resumed_run(plan: RankPlan, config: AdaptiveConfig, source: str) -> None:
    """Refuse to resume a run, of whatever version, that was started with other settings of ranks.

    Raises:
        PlanError: settings differ; the message names each of them.
    """
    check_same_run(with_all_options(plan), config, source, make_method(config.method, config.options))


def with_all_options(plan: RankPlan) -> RankPlan:
    """Add the options that a plan does not hold: of the method of its ranks, and of the one that used the ranks."""
    used = {key: _all_flat(plan.provenance[key]) for key in ("sampling", "second_stage") if plan.provenance.get(key)}
    return replace(plan, options=_all(plan.method, plan.options), provenance={**plan.provenance, **used})


def _all(method: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the options of a method; those without effect beside the others get the defaults of today."""
    if method not in methods():
        return dict(stored)
    owner = get_method(method).Options
    values, today = with_earlier_values(owner, stored), {entry.name: entry.default for entry in fields(owner)}
    if not values.keys() <= today.keys():  # of a later version
        return values
    idle = [problem.key.removeprefix(f"{method}_") for problem in contradictions(owner(**values))]
    return completed(owner, {**values, **{name: today[name] for name in idle}})


def _all_flat(used: Mapping[str, Any]) -> dict[str, Any]:
    """Complete options by YAML key, beside the key of the method."""
    method = str(used.get("adaptive_method"))
    stored = {key.removeprefix(f"{method}_"): value for key, value in used.items() if key != "adaptive_method"}
    return {"adaptive_method": method, **{f"{method}_{key}": value for key, value in _all(method, stored).items()}}
