"""Checks between keys: unknown names, keys that the method does not read, the budget against its bounds.

Pure standard library, on the flat mapping of a run's settings.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from llamafactory_adaptive.config.arguments import COURSE_KEYS, PRUNING_KEYS, SCORING_KEYS, SEARCH_KEYS, START_KEYS
from llamafactory_adaptive.config.search_conflicts import check_given_conflicts, check_search_conflicts
from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.options import coerce
from llamafactory_adaptive.ranks.search_config import (
    ExchangeConfig,
    GivenRanksConfig,
    PruningConfig,
    ReallocationConfig,
    SearchConfig,
    Strategy,
)


def unknown_key_problems(given: Mapping[str, Any], known: Iterable[str]) -> list[Problem]:
    """Find keys that neither LLaMA-Factory nor this plugin has, each with the nearest known key."""
    names = set(known)
    problems = []
    for key, value in given.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), sorted(names), n=1, cutoff=0.6)
            hint = near[0] if near else "leaving it out"
            problems.append(Problem(str(key), value, "neither LLaMA-Factory nor this plugin has such a key", hint))
    return problems


# Keys of where the base is measured, and with them all keys of what is measured before training.
PLACEMENT_KEYS = (
    "adaptive_calibration_process",
    "adaptive_calibration_device_map",
    "adaptive_calibration_max_memory",
    "adaptive_calibration_offload_folder",
)
CALIBRATION_KEYS = (
    "adaptive_calibration_dataset",
    "adaptive_calibration_samples",
    "adaptive_calibration_batch_size",
    "adaptive_calibration_seed",
    *PLACEMENT_KEYS,
)


def check_kind(
    flat: Mapping[str, Any], method: str, dynamic: bool, strategy: Strategy, cuts_once: bool = False
) -> list[Problem]:
    """Find keys of methods that calibrate, search or prune, given to a method that does not: they have no effect."""
    idle: dict[str, tuple[str, str]] = {}
    if strategy == "fixed":
        idle |= dict.fromkeys(SEARCH_KEYS, ("fixes ranks before training, so every evaluation counts", "igu"))
    if dynamic:
        reason = "chooses components one by one while it trains"
        idle |= dict.fromkeys(SCORING_KEYS, (reason, "sensitivity"))
        reason = "finds ranks during training and calibrates nothing"
        idle |= dict.fromkeys(CALIBRATION_KEYS, (reason, "sensitivity"))
    if strategy == "exchange":
        reason = "starts at the ranks of the budget, which are exchanged later on"
        idle |= dict.fromkeys(START_KEYS, (reason, "igu"))
    elif strategy != "prune":
        reason = (
            "moves ranks about and prunes nothing" if dynamic else "fixes ranks before training and prunes nothing"
        )
        idle |= dict.fromkeys(PRUNING_KEYS, (reason, "igu"))
    elif cuts_once:
        reason = "cuts the ranks once, where adaptive_final_ratio says"
        idle |= dict.fromkeys(COURSE_KEYS, (reason, "igu"))
    return [
        Problem(key, flat[key], f"adaptive_method: {method} {reason}", f"leaving it out, or adaptive_method: {other}")
        for key, (reason, other) in idle.items()
        if flat.get(key) is not None
    ]


def check_interval(flat: Mapping[str, Any]) -> list[Problem]:
    """Find what speaks against a distance of allocations that is given as a share of an epoch."""
    key = "adaptive_interval_epochs"
    problems = []
    if (share := flat.get(key)) is None:
        return []
    if (steps := flat.get("adaptive_interval")) is not None:
        reason = f"adaptive_interval ({steps}) says the same in steps, and only one of both can hold"
        problems.append(Problem(key, share, reason, "leaving adaptive_interval out"))
    if flat.get("streaming"):
        reason = "a stream has no known length, so the steps of an epoch are not known"
        problems.append(Problem(key, share, reason, "adaptive_interval: 10 in its place, or streaming: false"))
    return problems


def check_given(flat: Mapping[str, Any], made: Any, seed: int) -> tuple[GivenRanksConfig | None, list[Problem]]:
    """Check how a method trains the ranks of ``adaptive_plan``.

    Args:
        flat: the run's settings.
        made: the method with its options.
        seed: the seed of the factors.

    Returns:
        The configuration, None where they are trained as plain LoRA, and the problems.
    """
    if not made.traits.triplets_with_plan:
        return None, []
    return GivenRanksConfig(seed), check_given_conflicts(flat)


def check_without_plan(flat: Mapping[str, Any], method: str, made: Any) -> list[Problem]:
    """Find options that only a run with ``adaptive_plan`` reads, in a run without one."""
    keys = [f"{method}_{option}" for option in made.traits.only_with_plan]
    reason = "it is read only where adaptive_plan gives the ranks"
    return [
        Problem(key, flat[key], reason, f"leaving {key} out, or adaptive_plan: <path>")
        for key in keys
        if flat.get(key) is not None
    ]


def check_pruning(
    flat: Mapping[str, Any],
    common: Mapping[str, Any],
    lora_rank: int,
    max_rank: int,
    seed: int,
    cuts_once: bool = False,
) -> tuple[PruningConfig, list[Problem]]:
    """Build the schedule of a method that prunes, and check it against the budget."""
    if cuts_once:
        common = {**common, "adaptive_warmup_ratio": 0.0, "adaptive_interval": None, "adaptive_interval_epochs": None}
    problems = check_interval(flat)
    given = common["adaptive_init_rank"]
    init_rank = min(2 * lora_rank, max_rank) if given is None else given
    if not lora_rank < init_rank <= max_rank:
        key = "adaptive_max_rank" if given is None else "adaptive_init_rank"
        reason = (
            f"the start must be over-ranked: above lora_rank ({lora_rank}), at most adaptive_max_rank ({max_rank})"
        )
        value = max_rank if given is None else given
        problems.append(Problem(key, value, reason, f"{key}: {2 * lora_rank}"))
    problems += _check_ratios(common, "prune")
    overhead = common["adaptive_max_overhead"]
    return PruningConfig(init_rank, max_overhead=overhead, seed=seed, **_course(common)), problems


def _check_ratios(common: Mapping[str, Any], change: str) -> list[Problem]:
    """Find ratios that leave no step in which ranks could change; ``change`` says how they do."""
    ratios = {key: common[key] for key in ("adaptive_warmup_ratio", "adaptive_final_ratio")}
    if sum(ratios.values()) < 1.0:
        return []
    larger, smaller = sorted(ratios, key=lambda key: -ratios[key])
    reason = f"with {smaller} {ratios[smaller]:g} it leaves no step to {change} in"
    return [Problem(larger, ratios[larger], reason, f"{larger}: {(1 - ratios[smaller]) / 2:g}")]


def _course(common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that say at which steps ranks change."""
    epochs = common["adaptive_interval_epochs"]
    return {
        "warmup_ratio": common["adaptive_warmup_ratio"],
        "final_ratio": common["adaptive_final_ratio"],
        "interval": None if epochs is not None else common["adaptive_interval"],
        "interval_epochs": epochs,
    }


def _check_lowest(made: Any, low: int) -> list[Problem]:
    """Find a lowest rank that is below what the method can do with."""
    if low >= (lowest := made.traits.lowest_rank):
        return []
    reason = "a module without components has nothing to score, and would never come back"
    return [Problem("adaptive_min_rank", low, reason, f"adaptive_min_rank: {lowest}")]


def check_exchange(
    flat: Mapping[str, Any], common: Mapping[str, Any], made: Any, lora_rank: int, max_rank: int, seed: int
) -> tuple[ExchangeConfig, list[Problem]]:
    """Build the settings of a method that exchanges ranks under a constant budget, and check its bounds."""
    problems = check_interval(flat) + _check_ratios(common, "exchange ranks")
    problems += _check_lowest(made, common["adaptive_min_rank"])
    if max_rank == lora_rank:
        reason = f"all modules start at lora_rank ({lora_rank}), and none could grow"
        problems.append(Problem("adaptive_max_rank", max_rank, reason, f"adaptive_max_rank: {4 * lora_rank}"))
    return ExchangeConfig(max_rank, seed=seed, **_course(common)), problems


def check_reallocation(
    method: str, made: Any, low: int, lora_rank: int, max_rank: int, seed: int
) -> tuple[ReallocationConfig, list[Problem]]:
    """Check the bounds of a method that moves ranks about under a constant budget.

    Args:
        method: the method's name, for the keys of its options.
        made: the method with its options.
        low: the lowest rank of a module.
        lora_rank: the budget.
        max_rank: the highest rank of a module.
        seed: the seed of the LoRA factors.

    Returns:
        The configuration of how ranks move, and the problems.
    """
    problems = _check_lowest(made, low)
    if made.traits.samples and made.sampling.scales_budget and 2 * low > lora_rank:
        reason = f"the budget may fall to half of lora_rank ({lora_rank}) with {method}_phi: quality"
        problems.append(Problem("adaptive_min_rank", low, reason, f"adaptive_min_rank: {lora_rank // 2}"))
    return ReallocationConfig(max_rank, made.refresh_ratio, made.beta, seed), problems


def check_budget(flat: Mapping[str, Any], common: Mapping[str, Any]) -> tuple[int, float, int, list[Problem]]:
    """Check ``lora_rank``, ``lora_alpha`` and the rank bounds against each other.

    Returns:
        ``lora_rank``, ``lora_alpha`` (default 2 x rank, as upstream), the upper bound in use, and the problems.
    """
    problems: list[Problem] = []
    rank = _positive_int(flat, "lora_rank", 8, problems)
    alpha = _positive_int(flat, "lora_alpha", 2 * rank, problems)
    low, high = common["adaptive_min_rank"], common["adaptive_max_rank"] or 4 * rank
    if high < rank:
        problems.append(
            Problem(
                "adaptive_max_rank",
                high,
                f"must be at least lora_rank ({rank}), or the budget cannot be spent",
                f"adaptive_max_rank: {4 * rank}",
            )
        )
    if low > rank:
        problems.append(
            Problem(
                "adaptive_min_rank",
                low,
                f"must be at most lora_rank ({rank}), or the budget is overspent",
                "adaptive_min_rank: 1",
            )
        )
    return rank, float(alpha), high, problems


def _positive_int(flat: Mapping[str, Any], key: str, default: int, problems: list[Problem]) -> int:
    value = flat.get(key)
    if value is None:
        return default
    try:
        number = int(coerce(value, int))
    except (ValueError, TypeError, OverflowError):
        number = 0
    if number < 1:
        problems.append(Problem(key, value, "must be a whole number of at least 1", f"{key}: {default}"))
        return default
    return number


def check_search(
    flat: Mapping[str, Any],
    common: Mapping[str, Any],
    method: str,
    made: Any,
    lora_rank: int,
    max_rank: int,
    seed: int,
) -> tuple[SearchConfig, list[Problem]]:
    """Check how a method changes ranks while training, and find upstream options that cannot go with that.

    Args:
        flat: the run's settings.
        common: the keys that hold for every method, defaults filled in.
        method: the method's name, for the keys of its options.
        made: the method with its options.
        lora_rank: the budget.
        max_rank: the highest rank of a module.
        seed: the seed of the LoRA factors and, where a method prunes, of its extra passes.

    Returns:
        The configuration of the rank changes, and the problems.
    """
    problems = check_search_conflicts(flat, made)
    search: SearchConfig
    if made.traits.strategy == "reallocate":
        search, faults = check_reallocation(method, made, common["adaptive_min_rank"], lora_rank, max_rank, seed)
    elif made.traits.strategy == "exchange":
        search, faults = check_exchange(flat, common, made, lora_rank, max_rank, seed)
    else:
        search, faults = check_pruning(flat, common, lora_rank, max_rank, seed, made.traits.spectral)
    return search, problems + faults
