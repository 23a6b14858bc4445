"""What the choice of a rate leaves open: by how much each arm may be away from the best rate of its grid.

Few runs choose a rate, and where rates are nearly level it is chance that chooses. Two arms that are alike are then
judged at different rates, between which there is a true difference, and the more seeds judge the surer it is found. It
tells of the choices, not of the arms: in simulations without it (``tests/unit/comparison/test_choice_luck.py``) one
such arm in ten was called better or worse with five seeds, and one in three with thirty, where 5 % were to be.

So the interval of a difference covers the choices, too. A draw takes the rows that choose with replacement, and moves
each point of both grids as another seed may have moved it: by Student's t, in the standard deviation between seeds
that the runs which judge show. What a choice cost in this draw is the loss at the point chosen above the lowest of the
grid, 0 or more. The difference of both arms, each at the best point of its grid, is that seen, less what the choice
cost the arm, plus what it cost the rival. The drawn losses are the posterior ones under flat priors, by which a choice
costs rather too much than too little: an interval is too wide where rates are level and few seeds chose, not too
narrow.

That a better rate lies beside the grid or beyond its ends, or that shorter runs chose another, is not in it.

Shapes: R rows that choose, K points of a grid, B draws.
"""

import math
from collections.abc import Sequence

import numpy as np

from llamafactory_adaptive.comparison.losses import Curve, FloatArray


_CHUNK = 500  # draws of rows at a time, to bound memory


def drawn_curves(curves: Sequence[Curve], rng: np.random.Generator, draws: int) -> list[FloatArray]:
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


def cost_of_choices(
    arm: tuple[Curve, FloatArray],
    rival: tuple[Curve, FloatArray],
    between_seeds: float,
    seeds: int,
    rng: np.random.Generator,
) -> FloatArray:
    """Draw what its rate's choice cost the rival, less what it cost the arm, as a share of the rival's loss; (B,).

    Args:
        arm: curve of the arm, and the draws of it.
        rival: the same of the rival.
        between_seeds: variance of one seed's relative difference between both.
        seeds: number of seeds that this was estimated from.
        rng: source of the draws.
    """
    level = float(rival[1][:, rival[0].chosen].mean())
    freedom = seeds - 1
    scale_B1 = np.zeros((len(rival[1]), 1))
    if freedom:
        scale_B1 = np.sqrt(freedom / rng.chisquare(freedom, scale_B1.shape))
    # A difference has the noise of two runs, each of which has half of its variance.
    scale_B1 = scale_B1 * level * math.sqrt(between_seeds / 2.0)
    cost_of_rival, cost_of_arm = (_cost(*each, scale_B1, rng) for each in (rival, arm))
    return (cost_of_rival - cost_of_arm) / level


def _cost(curve: Curve, loss_BK: FloatArray, scale_B1: FloatArray, rng: np.random.Generator) -> FloatArray:
    moved_BK = loss_BK + scale_B1 / math.sqrt(curve.seeds) * rng.standard_normal(loss_BK.shape)
    cost_B: FloatArray = moved_BK[:, curve.chosen] - moved_BK.min(axis=1)
    return cost_B
