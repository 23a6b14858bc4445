"""Losses of an arm on held-out rows, by seed and row.

Shapes: S seeds, R held-out rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


FloatArray = npt.NDArray[np.float64]


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

    def of_seeds(self, seeds: Sequence[int]) -> "Losses":
        """Return the losses of these seeds, in their order."""
        return Losses(tuple(seeds), self.rows_SR[[self.seeds.index(seed) for seed in seeds]], self.tokens_R)
