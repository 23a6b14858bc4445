"""What the choice of a rate leaves open: by how much each arm may be away from the best rate of its grid.

Few runs choose a rate, and where rates are nearly level it is chance that chooses. Two arms that are alike are then
judged at different rates, between which there is a true difference, and the more seeds judge the surer it is found. It
tells of the choices, not of the arms: in simulations without it one such arm in eight was called better or worse with
five seeds that judge, and one in three with thirty, where 5 % were to be.

So the interval of a difference covers the choices, too. A draw takes the rows that choose with replacement, and moves
each point of both grids as another seed may have moved it: by Student's t, in the standard deviation between seeds
that the runs which judge show. What a choice cost in this draw is the loss at the point chosen above the lowest of the
grid, 0 or more. The difference of both arms, each at the best point of its grid, is that seen, less what the choice
cost the arm, plus what it cost the rival. The drawn losses are the posterior ones under flat priors, by which a choice
costs rather too much than too little, the more so the more points are level; so that this does not speak for the arm
with more of them, an interval reaches as far as it does either with the middle of these costs or without it.

What a run's seed moves is taken from differences between arms with the same seed, as the rates of an arm have the same
seed, too: an order of rows that suits one rate suits the others. Of the variance of such a difference each arm has the
share of its own variance over seeds, and at least half. Seeds that change which rate is best by more than that are not
covered, nor are a better rate beside the grid or beyond its ends, or shorter runs that chose another.

Shapes: R rows that choose, K points of a grid, B draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llamafactory_adaptive.comparison.losses import Curve, FloatArray, Losses


_CHUNK = 500  # draws of rows at a time, to bound memory


@dataclass(frozen=True, eq=False)
class DrawnCurve:
    """Draws of the losses by which an arm's point was chosen.

    Attributes:
        curve: the losses seen.
        loss_BK: mean losses of each draw of rows.
        noise: variance of a run over seeds, as a share of the rival's loss squared.
    """

    curve: Curve
    loss_BK: FloatArray
    noise: float = 0.0


@dataclass(frozen=True, eq=False)
class CostOfChoices:
    """What the choice of both rates adds to a relative difference: its cost to the rival, less that to the arm.

    Attributes:
        drawn_B: draws of it.
        over_rows: its standard error as far as the rows that choose tell.
        over_seeds: what the seeds that choose add to this standard error, squared and added.
    """

    drawn_B: FloatArray
    over_rows: float = 0.0
    over_seeds: float = 0.0


def noise_of_runs(
    arm_SR: FloatArray, rival_SR: FloatArray, weight_R: FloatArray, between_seeds: float
) -> tuple[float, float, int]:
    """Divide the variance of one seed's difference between the two runs; with it return the number of seeds."""
    S = len(arm_SR)
    if S == 1:
        return 0.0, 0.0, S
    own = [float((rows_SR @ weight_R).var(ddof=1)) for rows_SR in (arm_SR, rival_SR)]
    whole = sum(own) or 1.0
    of_arm, of_rival = (between_seeds * max(0.5, each / whole) for each in own)
    return of_arm, of_rival, S


def costs_of_choices(
    rival: Losses,
    arms: Sequence[Losses],
    noises: Sequence[tuple[float, float, int]],
    rng: np.random.Generator,
    draws: int,
) -> list[CostOfChoices]:
    """Draw what the choice of both rates adds to the relative difference of each arm; nothing where all were given.

    Args:
        rival: losses of the rival, with its curve.
        arms: losses of the arms, with their curves.
        noises: as :func:`noise_of_runs` gives them, for each arm.
        rng: source of the draws.
        draws: number of draws.

    Raises:
        ValueError: the settings of some were chosen, and those of others given.
    """
    curves = [curve for losses in (rival, *arms) if (curve := losses.curve) is not None]
    if not curves:
        return [CostOfChoices(np.zeros(draws)) for _ in arms]
    if len(curves) <= len(arms):
        raise ValueError("the settings of some arms were chosen, and those of others given")
    of_rival, *of_arms = zip(curves, _drawn(curves, rng, draws), strict=True)
    return [
        _cost_of_choices(DrawnCurve(*of_arm, arm_noise), DrawnCurve(*of_rival, rival_noise), seeds, rng)
        for of_arm, (arm_noise, rival_noise, seeds) in zip(of_arms, noises, strict=True)
    ]


def _drawn(curves: Sequence[Curve], rng: np.random.Generator, draws: int) -> list[FloatArray]:
    """Draw the rows that choose with replacement, the same for all curves: mean losses of each draw, (B, K) each."""
    tokens_R = curves[0].tokens_R
    R = len(tokens_R)
    weighted_RK = np.concatenate([curve.rows_KR for curve in curves]).T * tokens_R[:, None]
    parts = []
    for done in range(0, draws, _CHUNK):
        count_BR = rng.multinomial(R, np.full(R, 1.0 / R), size=min(_CHUNK, draws - done))
        parts.append(count_BR @ weighted_RK / (count_BR @ tokens_R)[:, None])
    ends = np.cumsum([len(curve.rows_KR) for curve in curves])
    return np.split(np.concatenate(parts), ends[:-1], axis=1)


def _cost_of_choices(arm: DrawnCurve, rival: DrawnCurve, seeds: int, rng: np.random.Generator) -> CostOfChoices:
    """Draw what the choice of the rate cost the rival, less what it cost the arm, as a share of the rival's loss.

    Args:
        arm: curve of the arm.
        rival: curve of the rival.
        seeds: number of seeds that the noise of both was estimated from.
        rng: source of the draws.
    """
    level = float(rival.loss_BK[:, rival.curve.chosen].mean())
    by_rows_B = _cost(rival, 0.0, level, rng) - _cost(arm, 0.0, level, rng)
    over_rows = _size(by_rows_B)
    if seeds == 1:
        return CostOfChoices(by_rows_B, over_rows)
    known_B = _cost(rival, 1.0, level, rng) - _cost(arm, 1.0, level, rng)
    over_seeds = math.sqrt(max(0.0, _size(known_B) ** 2 - over_rows**2))
    student_B1 = np.sqrt((seeds - 1) / rng.chisquare(seeds - 1, (len(known_B), 1)))
    drawn_B = _cost(rival, student_B1, level, rng) - _cost(arm, student_B1, level, rng)
    return CostOfChoices(drawn_B, over_rows, over_seeds)


def _cost(drawn: DrawnCurve, scale: FloatArray | float, level: float, rng: np.random.Generator) -> FloatArray:
    """Draw by how much the loss at the point chosen is above the lowest of the grid, as a share of ``level``; (B,)."""
    noise = scale * math.sqrt(drawn.noise / drawn.curve.seeds)
    moved_BK = drawn.loss_BK / level + noise * rng.standard_normal(drawn.loss_BK.shape)
    cost_B: FloatArray = moved_BK[:, drawn.curve.chosen] - moved_BK.min(axis=1)
    return cost_B


def _size(cost_B: FloatArray) -> float:
    """Return the root mean square."""
    return math.sqrt(float((cost_B**2).mean()))
