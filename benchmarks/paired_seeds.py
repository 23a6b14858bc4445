"""Differences of arms seed by seed: Student's t over seeds, Holm's correction over arms, a verdict in words."""

from collections.abc import Sequence

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
