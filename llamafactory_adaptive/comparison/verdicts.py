"""Verdicts of a comparison: is an arm better than its rival, worse, equivalent, or is it not decided?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from llamafactory_adaptive.comparison.differences import Difference, paired_differences
from llamafactory_adaptive.comparison.losses import Losses, far_seed
from llamafactory_adaptive.comparison.more_seeds import (
    LEVEL,
    rate_seeds_to_decide,
    rows_too_few,
    seeds_to_decide,
)


Verdict = Literal["better", "worse", "equivalent", "not decided", "diverged"]


@dataclass(frozen=True)
class Judgement:
    """Verdict on an arm, and what it rests on.

    Attributes:
        arm: name of the arm.
        rival: name of the rival.
        verdict: "diverged" where a run of the arm diverged at its best setting.
        effect: smallest relative difference that matters, fixed before.
        difference: arm minus rival; None where either diverged.
        p_holm: p value of no difference, corrected for the number of arms; None with one seed, or where either
            diverged.
        tests: number of arms that this corrects for.
        seeds_to_decide: where not decided, with how many seeds it would be; None where no number up to ``MOST_SEEDS``
            would do, or only one seed ran, so that nothing is known of seeds.
        rate_seeds_to_decide: where no number of seeds that judge would do, with how many that choose it would, and
            with how many that judge; None where neither would.
        more_rows: whether it is not decided for want of rows, so that seeds alone cannot decide it.
        far_seed: where not decided, the arm or the rival and its seed that ended far above the others, so that nothing
            can be told of how many would decide it; None where none did.
    """

    arm: str
    rival: str
    verdict: Verdict
    effect: float
    difference: Difference | None = None
    p_holm: float | None = None
    tests: int = 0
    seeds_to_decide: int | None = None
    rate_seeds_to_decide: tuple[int, int] | None = None
    more_rows: bool = False
    far_seed: tuple[str, int] | None = None

    @property
    def different(self) -> bool:
        """Tell whether there is a difference, however small: p after Holm is at most 5 %."""
        return self.p_holm is not None and self.p_holm <= LEVEL


@dataclass(frozen=True)
class _Family:
    """What the judgements of one comparison have in common."""

    rival: str
    effect: float
    losses: Mapping[str, Losses]
    differences: Mapping[str, Difference]
    p_holm: Mapping[str, float]


def judge(losses: Mapping[str, Losses], rival: str, effect: float, seed: int = 0) -> list[Judgement]:
    """Compare every arm with the rival on the test half of the held-out rows, each at its best setting.

    * equivalent: the 90 % interval of the relative difference lies within +- effect, which is two one-sided tests at
      5 % (Schuirmann 1987). Each arm is tested at 5 %: that it is level with the rival is no discovery of which the
      best of many could be picked.
    * better, worse: the p value of no difference, two-sided, is at most 5 % after Holm's correction over all arms
      that ran with two seeds or more.
    * not decided: neither, or only one seed ran. Rows alone cannot tell what other seeds would have shown.

    A difference may be there and still lie within the effect, so that an arm is both. It is then "equivalent": the
    effect was fixed before as the least that matters, and "does it pay?" has the answer no whatever its sign. With
    enough seeds and rows every two arms differ by something. ``Judgement.different`` keeps what was found, and the
    words tell it.

    Intervals and p values cover that other seeds, or another half that chooses, might have chosen another rate of the
    grid (``rate_choice``).

    Args:
        losses: losses of every arm and of the rival, by name, on the rows that judge.
        rival: name of the arm that the others are compared with.
        effect: smallest relative difference that matters, a share of the rival's loss (0.005 is half a per cent).
        seed: seed of the bootstrap.

    Returns:
        One judgement per arm but the rival, in the order of ``losses``.

    Raises:
        AdaptiveConfigError: there are too few rows.
        ValueError: rows of the arms differ, or an arm shares no seed with the rival.
    """
    arms = [name for name in losses if name != rival]
    compared = [] if losses[rival].diverged else [name for name in arms if not losses[name].diverged]
    paired = paired_differences(losses[rival], [losses[name] for name in compared], seed) if compared else []
    differences = dict(zip(compared, paired, strict=True))
    tested = [name for name in compared if differences[name].seeds > 1]
    corrected = holm([differences[name].p_value for name in tested])
    family = _Family(rival, effect, losses, differences, dict(zip(tested, corrected, strict=True)))
    return [_judgement(name, family) for name in arms]


def _judgement(arm: str, family: _Family) -> Judgement:
    difference, p_holm, diverged = family.differences.get(arm), family.p_holm.get(arm), family.losses[arm].diverged
    if diverged or difference is None or p_holm is None:
        return Judgement(arm, family.rival, "diverged" if diverged else "not decided", family.effect, difference)
    verdict, tests = _verdict(difference, p_holm, family.effect), len(family.p_holm)
    judgement = Judgement(arm, family.rival, verdict, family.effect, difference, p_holm, tests)
    return _with_remedy(judgement, difference, family) if verdict == "not decided" else judgement


def _with_remedy(judgement: Judgement, difference: Difference, family: _Family) -> Judgement:
    """Add what would decide a judgement that is not decided, the least first."""
    names = judgement.arm, judgement.rival
    common = family.losses[judgement.arm].common_seeds(family.losses[judgement.rival])
    for name in names:
        if (place := far_seed(family.losses[name].of_seeds(common).by_seed())) is not None:
            return replace(judgement, far_seed=(name, common[place]))
    of = difference, judgement.effect, judgement.tests
    if (seeds := seeds_to_decide(*of)) is not None:
        return replace(judgement, seeds_to_decide=seeds)
    if (more := rate_seeds_to_decide(*of)) is not None:
        return replace(judgement, rate_seeds_to_decide=more)
    return replace(judgement, more_rows=rows_too_few(*of))


def _verdict(difference: Difference, p_holm: float, effect: float) -> Verdict:
    relative = difference.relative
    if -effect < relative.low_90 and relative.high_90 < effect:
        return "equivalent"
    if p_holm <= LEVEL:
        return "better" if relative.value < 0.0 else "worse"
    return "not decided"


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of one family, so that any false finding in it is as rare as the level (Holm 1979).

    The smallest is multiplied by their number, the next by one less, and so on; none falls below one before it.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - place)))
        corrected[index] = largest
    return corrected
