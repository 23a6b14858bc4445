"""Differences of arms seed by seed: Student's t over seeds, Holm's correction over arms, a verdict in words."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from method_arms import base_of
from scipy import stats

from llamafactory_adaptive.comparison import verdicts


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Second minus first, seed by seed: mean, 95 % interval, p value; the mean alone where there is one seed."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    difference = {"mean": sum(differences) / len(differences)}
    if len(differences) > 1 and any(differences):
        test = stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        difference |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
    return difference


def holm(differences: Sequence[dict[str, float]]) -> None:
    """Add ``p_holm`` where there is a p value: corrected for their number."""
    tested = [each for each in differences if "p" in each]
    for difference, corrected in zip(tested, verdicts.holm([each["p"] for each in tested]), strict=True):
        difference["p_holm"] = corrected


def verdict(difference: dict[str, float]) -> str:
    if "p_holm" not in difference:
        return "no difference" if difference["mean"] == 0.0 else "one seed: nothing can be said"
    if difference["p_holm"] >= 0.05:
        return "no difference shown"
    return "better on these rows" if difference["mean"] < 0.0 else "worse on these rows"


def tell_differences(rows: dict[str, dict[str, Any]]) -> None:
    """Add to each arm its differences to plain LoRA, to ``published`` and to its base, over the seeds that both have.

    The base of an arm is the one without the part that it is there to tell of.
    """
    for rival in ("lora", "published"):
        others = [arm for arm in rows if arm not in ("lora", rival)]
        if rival in rows:
            _tell(rows, dict.fromkeys(others, rival), f"over_{rival}")
    bases = {arm: base for arm in rows if (base := base_of(arm)) in rows}
    _tell(rows, bases, "over_base")
    for arm, base in bases.items():
        rows[arm]["over_base"]["base"] = base


def _tell(rows: dict[str, dict[str, Any]], rivals: Mapping[str, str], key: str) -> None:
    for arm, rival in rivals.items():
        both = list(zip(rows[rival]["losses"], rows[arm]["losses"], strict=False))  # the seeds that both have
        of_rival, of_arm = ([pair[side] for pair in both] for side in (0, 1))
        rows[arm][key] = {**paired(of_rival, of_arm), "equivalent": _within_half_a_per_cent(of_rival, of_arm)}
    holm([rows[arm][key] for arm in rivals])


def _within_half_a_per_cent(rival: Sequence[float], losses: Sequence[float]) -> bool:
    """Test for equivalence: the 90 % interval of the paired difference lies within 0.5 % of the rival's loss."""
    differences = [b - a for a, b in zip(rival, losses, strict=True)]
    if len(differences) < 2:
        return False
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.90)
    margin = 0.005 * statistics.fmean(rival)
    return bool(-margin < low and high < margin)
