"""The result of a comparison: what each arm reached at its best point, and its verdicts against LoRA and chance."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamafactory_adaptive.comparison.arms import CONTROL, PLAIN, Arm, Settings
from llamafactory_adaptive.comparison.experiment import Choice, Progress
from llamafactory_adaptive.comparison.losses import Losses
from llamafactory_adaptive.comparison.verdicts import Judgement, judge
from llamafactory_adaptive.comparison.words import judgement_in_words
from llamafactory_adaptive.ranks.module_names import module_type


SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ArmResult:
    """What came of one arm.

    Attributes:
        arm: the arm.
        choice: its curve over the grid and the best point; None if it could not be run.
        finals: what came of the runs at the best point, by seed.
        failed: why it could not be run; empty if it could.
    """

    arm: Arm
    choice: Choice | None
    finals: tuple[Mapping[str, Any], ...]
    failed: str = ""

    @property
    def judged(self) -> bool:
        """Tell whether there are losses that can be compared."""
        return bool(self.finals) and all(outcome["status"] == "done" for outcome in self.finals)

    def losses(self, tokens: Sequence[int]) -> Losses:
        """Return the losses of the rows that judge, by seed; NaN where a run diverged."""
        nothing = [math.nan] * len(tokens)
        rows = [outcome.get("test", nothing) for outcome in self.finals] or [nothing]
        return Losses(tuple(range(len(rows))), np.array(rows, float), np.array(tokens, float))


def arm_results(progress: Progress) -> list[ArmResult]:
    """Collect what is known of every arm of a finished comparison."""
    results = []
    for arm in progress.arms:
        if why := progress.failed.get(arm.name):
            results.append(ArmResult(arm, None, (), why))
        else:
            results.append(ArmResult(arm, progress.choice(arm.name), tuple(progress.finals(arm.name))))
    return results


def judgements(results: Sequence[ArmResult], tokens: Sequence[int], effect: float) -> dict[str, list[Judgement]]:
    """Compare all arms that ran with plain LoRA and with random ranks.

    Args:
        results: results of all arms, plain LoRA and random ranks among them.
        tokens: answer tokens of each row that judges.
        effect: smallest difference that matters, a share of the rival's loss.
    """
    losses = {result.arm.name: result.losses(tokens) for result in results if not result.failed}
    found = {PLAIN: judge(losses, PLAIN, effect)}
    if CONTROL in losses:
        others = {name: values for name, values in losses.items() if name != PLAIN}
        found[CONTROL] = judge(others, CONTROL, effect)
    return found


def document(
    results: Sequence[ArmResult], tokens: Mapping[str, Sequence[int]], effect: float, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Build the document that is written as ``compare.json`` and that the pages are made from.

    Args:
        results: results of all arms.
        tokens: answer tokens of each held-out row, by half.
        effect: smallest difference that matters.
        facts: further facts of the comparison: command, versions, rows, design.
    """
    found = judgements(results, tokens["test"], effect)
    plain = next(result for result in results if result.arm.name == PLAIN)
    by_arm = {rival: {judgement.arm: judgement for judgement in each} for rival, each in found.items()}
    return {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "smallest_effect": effect,
        "held_out_rows": {half: len(counts) for half, counts in tokens.items()},
        "arms": [_arm(result, plain, by_arm, tokens) for result in results],
    }


def _arm(
    result: ArmResult,
    plain: ArmResult,
    judged: Mapping[str, Mapping[str, Judgement]],
    tokens: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": result.arm.name, "settings": result.arm.settings}
    if result.failed or result.choice is None:
        return {**entry, "failed": result.failed}
    entry["curve"] = [
        {"rate": point.rate, "alpha": point.alpha, "dev_loss": None if math.isinf(loss) else loss}
        for point, loss in sorted(result.choice.curve.items(), key=lambda item: (item[0].alpha or 0, item[0].rate))
    ]
    verdicts = {rival: _verdict(each[result.arm.name]) for rival, each in judged.items() if result.arm.name in each}
    if not result.judged or result.choice.best is None:
        return {**entry, "diverged": True, "verdicts": verdicts}
    by_seed = result.losses(tokens["test"]).by_seed()
    return {
        **entry,
        "best": {"rate": result.choice.best.rate, "alpha": result.choice.best.alpha},
        "best_at_the_edge": result.choice.at_the_edge,
        "loss": statistics.fmean(by_seed),
        "losses": by_seed,
        "seconds": statistics.fmean(outcome["seconds"] for outcome in result.finals),
        "verdicts": verdicts,
        **budget(result, plain),
        "mean_ranks": mean_ranks(result.finals),
    }


def _verdict(judgement: Judgement) -> dict[str, Any]:
    return {**asdict(judgement), "words": judgement_in_words(judgement)}


def budget(result: ArmResult, plain: ArmResult) -> dict[str, Any]:
    """Compare the parameters of an arm's saved adapters with those of plain LoRA.

    They are equal where an arm has no more, and less of them missing than one rank of the cheapest module costs.
    """
    most = max(outcome["parameters"] for outcome in result.finals)
    least = min(outcome["parameters"] for outcome in result.finals)
    whole, one = plain.finals[0]["parameters"], plain.finals[0]["parameters_of_one_rank"]
    return {"parameters": most, "equal_parameters": whole - one < least and most <= whole}


def mean_ranks(finals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the mean rank of each module type over modules and seeds; modules without an adapter do not count."""
    ranks: dict[str, list[int]] = {}
    for outcome in finals:
        for name, rank in outcome["ranks"].items():
            ranks.setdefault(module_type(name), []).append(rank)
    return {kind: statistics.fmean(values) for kind, values in ranks.items()}


def verdict_lines(found: Mapping[str, Sequence[Judgement]]) -> list[str]:
    """List all judgements in words, those against plain LoRA first."""
    return [judgement_in_words(judgement) for each in found.values() for judgement in each]


def budget_words(entry: Settings, plain: Settings) -> str | None:
    """Describe an arm whose saved adapter has another number of parameters than plain LoRA's; None where equal."""
    if entry.get("equal_parameters", True):
        return None
    share = entry["parameters"] / plain["parameters"] - 1.0
    return f"{entry['name']} saves {abs(share):.1%} {'more' if share > 0 else 'fewer'} parameters than plain LoRA"
