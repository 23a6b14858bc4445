"""Losses of an arm on held-out rows, by seed and row, and those by which its rate was chosen.

Shapes: S seeds, R held-out rows, K points of a grid.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


FloatArray = npt.NDArray[np.float64]


_FEWEST_SEEDS, _FAR = 3, 1.5  # from which on a seed can be far from the median, in multiples of it


def far_seed(losses: Sequence[float]) -> int | None:
    """Find the seed that ended far above the others, as runs at too high a rate do: its place; None where none did."""
    if len(losses) < _FEWEST_SEEDS or (worst := max(losses)) <= _FAR * statistics.median(losses):
        return None
    return losses.index(worst)


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of an arm at the points of its grid, on the rows that choose.

    Attributes:
        rows_KR: mean loss over the answer tokens of each row, a mean over the seeds that choose. Points at which a run
            diverged are left out.
        tokens_R: number of answer tokens of each row.
        chosen: which of the points was chosen.
        seeds: number of seeds that chose.
    """

    rows_KR: FloatArray
    tokens_R: FloatArray
    chosen: int
    seeds: int


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of one arm at one setting, by seed and held-out row.

    Attributes:
        seeds: seeds of the runs.
        rows_SR: mean loss over the answer tokens of each row; NaN or infinite where a run diverged. A run that ended
            before it was evaluated is a row of NaN.
        tokens_R: number of answer tokens of each row.
        curve: what the setting was chosen by; None where it was given.

    Raises:
        ValueError: the shapes do not fit, a seed is there twice, or a row has no answer tokens.
    """

    seeds: tuple[int, ...]
    rows_SR: FloatArray
    tokens_R: FloatArray
    curve: Curve | None = None

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

    def common_seeds(self, other: "Losses") -> list[int]:
        """List the seeds that both have, in order."""
        return sorted(set(self.seeds) & set(other.seeds))

    def of_seeds(self, seeds: Sequence[int]) -> "Losses":
        """Return the losses of these seeds, in their order."""
        kept = [self.seeds.index(seed) for seed in seeds]
        return Losses(tuple(seeds), self.rows_SR[kept], self.tokens_R, self.curve)
