"""The result of a comparison: what each arm reached at its best point, and its verdicts against LoRA and chance."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llamafactory_adaptive.comparison.arms import CONTROL, PLAIN, Arm, GridPoint, Settings
from llamafactory_adaptive.comparison.experiment import Choice, Progress
from llamafactory_adaptive.comparison.losses import Curve, Losses
from llamafactory_adaptive.comparison.secrets import without_secrets
from llamafactory_adaptive.comparison.verdicts import Judgement, judge
from llamafactory_adaptive.comparison.words import judgement_in_words, what_would_decide
from llamafactory_adaptive.ranks.module_names import layer_order, module_type


SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ArmResult:
    """What came of one arm.

    Attributes:
        arm: the arm.
        choice: its curve over the grid and the best point; None if it could not be run.
        finals: what came of the runs that judge, by seed; not of all seeds where one could not be run.
        choosing: losses of the rows that choose, by point and seed; points at which a run diverged are left out.
        failed: why it could not be run, or not to its end; empty if it could.
    """

    arm: Arm
    choice: Choice | None
    finals: Mapping[int, Mapping[str, Any]]
    choosing: Mapping[GridPoint, Sequence[Sequence[float]]] = field(default_factory=dict)
    failed: str = ""

    @property
    def diverged(self) -> bool:
        """Tell whether no point of the grid is left."""
        return self.choice is not None and self.choice.best is None

    def losses(self, tokens: Mapping[str, Sequence[int]]) -> Losses:
        """Return the losses of the rows that judge, by seed, with what its point was chosen by; NaN if it diverged."""
        test = np.array(tokens["test"], float)
        rows = {seed: outcome["test"] for seed, outcome in self.finals.items()} or {0: [math.nan] * len(test)}
        return Losses(tuple(rows), np.array(list(rows.values()), float), test, self._curve(tokens["dev"]))

    def _curve(self, tokens: Sequence[int]) -> Curve | None:
        if self.choice is None or self.choice.best is None:
            return None
        rows = np.array([np.mean(by_seed, axis=0) for by_seed in self.choosing.values()])
        seeds = len(self.choosing[self.choice.best])
        return Curve(rows, np.array(tokens, float), list(self.choosing).index(self.choice.best), seeds)


def arm_results(progress: Progress) -> list[ArmResult]:
    """Collect what is known of every arm of a finished comparison."""
    return [_arm_result(progress, arm) for arm in progress.arms]


def _arm_result(progress: Progress, arm: Arm) -> ArmResult:
    choice, failed = progress.choice_if_known(arm.name), progress.failed.get(arm.name, "")
    if choice is None:
        return ArmResult(arm, None, {}, failed=failed)
    left = (point for point, figure in choice.curve.items() if math.isfinite(figure) and point not in choice.unstable)
    choosing = {point: progress.choosing_rows(arm.name, point) for point in left}
    return ArmResult(arm, choice, progress.finals(arm.name), choosing, failed)


def judgements(
    results: Sequence[ArmResult], tokens: Mapping[str, Sequence[int]], effect: float
) -> dict[str, list[Judgement]]:
    """Compare all arms that ran, or diverged, with plain LoRA and with random ranks.

    Args:
        results: results of all arms, plain LoRA and random ranks among them.
        tokens: answer tokens of each held-out row, by half.
        effect: smallest difference that matters, a share of the rival's loss.
    """
    compared = [result for result in results if result.finals or result.diverged]
    losses = {result.arm.name: result.losses(tokens) for result in compared}
    others = {name: values for name, values in losses.items() if name != PLAIN}
    rivals = {PLAIN: losses, CONTROL: others}
    return {rival: judge(_paired(each, rival), rival, effect) for rival, each in rivals.items() if rival in each}


def _paired(losses: Mapping[str, Losses], rival: str) -> dict[str, Losses]:
    """Remove arms that have no seed in common with the rival, as some of theirs could not be run."""
    seeds = set(losses[rival].seeds)
    return {name: each for name, each in losses.items() if each.diverged or seeds & set(each.seeds)}


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
    judged = judgements(results, tokens, effect)
    plain = next(result for result in results if result.arm.name == PLAIN)
    by_arm = {rival: {judgement.arm: judgement for judgement in each} for rival, each in judged.items()}
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
    entry: dict[str, Any] = {"name": result.arm.name, "settings": without_secrets(result.arm.settings)}
    entry |= {"failed": result.failed} if result.failed else {}
    if result.choice is None:
        return entry
    entry["curve"] = [
        {"rate": point.rate, "alpha": point.alpha, "dev_loss": None if math.isinf(loss) else loss}
        for point, loss in sorted(result.choice.curve.items(), key=lambda item: (item[0].alpha or 0, item[0].rate))
    ]
    entry["unstable"] = [asdict(point) for point in result.choice.unstable]
    verdicts = {rival: _verdict(each[result.arm.name]) for rival, each in judged.items() if result.arm.name in each}
    if result.choice.best is None:
        return {**entry, "diverged": True, "verdicts": verdicts}
    if not result.finals:
        return entry
    return {**entry, **_figures(result, plain, tokens), "verdicts": verdicts}


def _figures(result: ArmResult, plain: ArmResult, tokens: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Collect what an arm reached at its best point, over the seeds that judge."""
    assert result.choice is not None
    by_seed, outcomes = result.losses(tokens).by_seed(), list(result.finals.values())
    return {
        "best": asdict(result.choice.best) if result.choice.best else None,
        "best_at_the_edge": result.choice.at_the_edge,
        "best_alpha_at_the_edge": result.choice.alpha_at_the_edge,
        "seeds": list(result.finals),
        "loss": statistics.fmean(by_seed),
        "losses": by_seed,
        "steps": max(outcome.get("steps", 0) for outcome in outcomes),
        "seconds": statistics.fmean(outcome["seconds"] for outcome in outcomes),
        **budget(result, plain),
        "mean_ranks": mean_ranks(outcomes),
        "ranks": ranks_by_module(outcomes),
    }


def _verdict(judgement: Judgement) -> dict[str, Any]:
    words = {"words": judgement_in_words(judgement), "what_would_decide": what_would_decide(judgement)}
    return {**asdict(judgement), **words}


def budget(result: ArmResult, plain: ArmResult) -> dict[str, Any]:
    """Compare the parameters of an arm's saved adapters with those of plain LoRA.

    They are equal where an arm has no more, and less of them missing than one rank of the cheapest module costs; None
    where plain LoRA has no run that judges.
    """
    sizes = [outcome["parameters"] for outcome in result.finals.values()]
    if not plain.finals:
        return {"parameters": max(sizes), "equal_parameters": None}
    rival = next(iter(plain.finals.values()))
    whole, one = rival["parameters"], rival["parameters_of_one_rank"]
    return {"parameters": max(sizes), "equal_parameters": whole - one < min(sizes) and max(sizes) <= whole}


def mean_ranks(finals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the mean rank of each module type over modules and seeds; modules without an adapter do not count."""
    ranks: dict[str, list[int]] = {}
    for outcome in finals:
        for name, rank in outcome["ranks"].items():
            ranks.setdefault(module_type(name), []).append(rank)
    return {kind: statistics.fmean(values) for kind, values in ranks.items()}


def ranks_by_module(finals: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Compute the mean rank of each module over seeds, in the order of the model; 0 for a seed without an adapter."""
    names = sorted({name for outcome in finals for name in outcome["ranks"]}, key=layer_order)
    return {name: statistics.fmean(outcome["ranks"].get(name, 0) for outcome in finals) for name in names}


def budget_words(entry: Settings, plain: Settings) -> str | None:
    """Describe an arm whose saved adapter has another number of parameters than plain LoRA's; None where equal."""
    if entry.get("equal_parameters") is not False:
        return None
    share = entry["parameters"] / plain["parameters"] - 1.0
    by = f"{abs(share):.1%}" if abs(share) >= 0.0005 else "less than 0.1%"
    return f"{entry['name']} saves {by} {'more' if share > 0 else 'fewer'} parameters than plain LoRA"
