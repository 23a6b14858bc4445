"""Losses of an arm on held-out rows, and the setting of its grid that one half of these rows chooses.

The half that chooses (dev) judges nothing, and the half that judges (test) chooses nothing: the least of several noisy
losses is lower than what the same setting reaches on other rows.

Shapes: S seeds, R held-out rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


FloatArray = npt.NDArray[np.float64]
Setting = tuple[float | None, ...]  # one value per dimension of a grid; None for the value of the YAML
End = Literal["lowest", "highest"]


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of one arm at one setting, by seed and held-out row.

    Attributes:
        seeds: seeds of the runs.
        rows_SR: mean loss over the answer tokens of each row; NaN or infinite where a run diverged. A run that ended
            before it was evaluated is a row of NaN.
        tokens_R: number of answer tokens of each row.

    Raises:
        ValueError: the shapes do not fit, a seed is there twice, or a row has no answer tokens.
    """

    seeds: tuple[int, ...]
    rows_SR: FloatArray
    tokens_R: FloatArray

    def __post_init__(self) -> None:
        if self.rows_SR.size == 0 or self.rows_SR.shape != (len(self.seeds), len(self.tokens_R)):
            raise ValueError(f"{self.rows_SR.shape} is not ({len(self.seeds)} seeds, {len(self.tokens_R)} rows)")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a seed is there twice: {self.seeds}")
        if not np.all(self.tokens_R > 0):
            raise ValueError("every row needs answer tokens; leave out those without")

    @property
    def diverged(self) -> bool:
        """Tell whether the loss of any row is not finite, in any run."""
        return not bool(np.all(np.isfinite(self.rows_SR)))

    def by_seed(self) -> tuple[float, ...]:
        """Compute each run's mean loss over answer tokens; infinite where it diverged."""
        with np.errstate(invalid="ignore"):
            mean_S = self.rows_SR @ self.tokens_R / self.tokens_R.sum()
        return tuple(float(mean) if math.isfinite(mean) else math.inf for mean in mean_S)

    def on_rows(self, chosen_R: npt.NDArray[np.bool_]) -> "Losses":
        """Return the losses on the rows where ``chosen_R`` is true."""
        return Losses(self.seeds, self.rows_SR[:, chosen_R], self.tokens_R[chosen_R])

    def of_seeds(self, seeds: Sequence[int]) -> "Losses":
        """Return the losses of these seeds, in their order."""
        return Losses(tuple(seeds), self.rows_SR[[self.seeds.index(seed) for seed in seeds]], self.tokens_R)


@dataclass(frozen=True)
class CurvePoint:
    """Mean losses over answer tokens at one setting, one per seed, on either half of the held-out rows."""

    setting: Setting
    seeds: tuple[int, ...]
    dev: tuple[float, ...]
    test: tuple[float, ...]


@dataclass(frozen=True)
class Edge:
    """A dimension of a grid in which the best value is its lowest or highest: a better one may lie beyond."""

    dimension: str
    value: float
    end: End


@dataclass(frozen=True)
class Choice:
    """Best setting of an arm, and the whole grid that it was chosen from.

    Attributes:
        setting: the setting with the least mean loss on the dev half.
        diverged: whether a run diverged at every setting, so that there is no best one.
        edges: the dimensions in which the setting is at an end of the grid. Dimensions of a single value have none.
        curve: every setting in ascending order, with the losses of all seeds that ran there.
    """

    setting: Setting
    diverged: bool
    edges: tuple[Edge, ...]
    curve: tuple[CurvePoint, ...]


def choose_setting(grid: Mapping[Setting, Losses], dimensions: Sequence[str], dev_R: npt.NDArray[np.bool_]) -> Choice:
    """Choose the setting with the least mean loss on the dev half, over the seeds that ran at every setting.

    Other seeds are left out of the choice, since a setting must not win by an easy seed that others lack. A setting
    at which any run diverged, on either half, is infinitely bad. Of equal settings the first in the grid is taken.

    Args:
        grid: losses on all held-out rows, by setting.
        dimensions: what the values of a setting are, ("rate", "alpha") say.
        dev_R: which rows choose; the others are the test half.

    Raises:
        ValueError: no seed ran at every setting.
    """
    common = sorted(set.intersection(*(set(losses.seeds) for losses in grid.values())))
    if not common:
        raise ValueError("no seed ran at every setting of the grid")
    scores = {setting: _score(losses, common, dev_R) for setting, losses in grid.items()}
    best = min(scores, key=scores.__getitem__)
    diverged = scores[best] == math.inf
    edges = [] if diverged else _edges(best, grid, dimensions)
    curve = [_curve_point(setting, losses, dev_R) for setting, losses in grid.items()]
    curve.sort(key=lambda point: [(value is not None, value or 0.0) for value in point.setting])
    return Choice(best, diverged, tuple(edges), tuple(curve))


def _score(losses: Losses, seeds: Sequence[int], dev_R: npt.NDArray[np.bool_]) -> float:
    return math.inf if losses.diverged else float(np.mean(losses.of_seeds(seeds).on_rows(dev_R).by_seed()))


def _edges(best: Setting, grid: Mapping[Setting, Losses], dimensions: Sequence[str]) -> list[Edge]:
    """Find the dimensions in which the best value is an end of the grid."""
    edges: list[Edge] = []
    for name, value, column in zip(dimensions, best, zip(*grid, strict=True), strict=True):
        tried = {each for each in column if each is not None}
        if value is not None and len(tried) > 1 and value in (min(tried), max(tried)):
            edges.append(Edge(name, value, "lowest" if value == min(tried) else "highest"))
    return edges


def _curve_point(setting: Setting, losses: Losses, dev_R: npt.NDArray[np.bool_]) -> CurvePoint:
    dev, test = losses.on_rows(dev_R).by_seed(), losses.on_rows(~dev_R).by_seed()
    return CurvePoint(setting, losses.seeds, dev, test)
