"""Differences of arms to a rival in held-out loss, paired by seed and row, with a bootstrap over both.

Model: runs with other seeds and other held-out rows of the same kind would have come out differently, and neither is
nested in the other. A paired value of seed s and row i is ``z_si = mean + seed_s + row_i + both_si`` (two crossed
random effects), and the variance of the mean of S x R values is

    var(seed)/S + var(row)/R + var(both)/(S R).

The arm's figure is a mean over tokens, and the relative difference a ratio: ``z`` is the first-order influence of each
value on it (Cochran 1977, Sampling Techniques, chapter 6), whose mean is the difference itself.

Rows are drawn with replacement, and what a draw tells is studentised (bootstrap-t: Efron and Tibshirani 1993, chapter
12), as row losses are skewed. Where long rows carry most of the tokens, few rows decide, and a mean over tokens comes
out less certain than the rows' spread tells: each influence is divided by 1 - (its row's share of the tokens), as the
jackknife does (MacKinnon and White 1985, HC3), and no quantile of the draws is nearer to 0 than Student's with ``(sum
w^2)^2 / sum w^4`` degrees of freedom (Bell and McCaffrey 2002, Satterthwaite's rule for such weights w). Without the
two, 64 rows with a log-normal number of tokens had 7 % to 9 % errors instead of 5 %.

Seeds cannot be drawn so. From three seeds a draw takes the same one three times in one case of nine; the percentile
interval over S seeds is too narrow by sqrt((S-1)/S) and by Student's quantile against the normal one (Hesterberg 2015,
What Teachers Should Know About the Bootstrap), which for three seeds leaves 0.37 of the right width; and no resampling
of both ways is exact (McCullagh 2000, Resampling and exchangeable arrays; Owen 2007, The pigeonhole bootstrap). So
each draw deviates from the seeds' mean by Student's t with S-1 degrees of freedom, times the standard error over
seeds. The two deviations are independent and are added. For normal effects this is Behrens' and Fisher's interval,
whose errors stay below the level (Robinson 1976, Properties of Student's t and of the Behrens-Fisher solution).
Satterthwaite's degrees of freedom would give narrower intervals, but with three seeds up to 7.8 % errors instead of 5
% (where nine tenths of the variance are the seeds').

``var(both)/(S R)`` is part of the variance between seeds' means, and is taken off the one between rows' means, so that
it counts once. With one seed the interval covers rows alone. What the choice of both rates leaves open is added
draw by draw (``rate_choice``).

Shapes: S seeds, R rows, M measures (an arm's relative or absolute difference), B draws of rows, T draws of seeds.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llamafactory_adaptive.comparison.losses import FloatArray, Losses
from llamafactory_adaptive.comparison.rate_choice import CostOfChoices, costs_of_choices, noise_of_runs
from llamafactory_adaptive.errors import refuse


FEWEST_ROWS = 20  # fewer do not represent the rows that others might be
ROW_DRAWS, SEED_DRAWS = 10_000, 10  # draws of rows, and draws of seeds for each of these
_CHUNK = 500  # draws of rows at a time, to bound memory
_LEAST_ERROR = 0.1  # floor of a draw's standard error, in that of the rows: a draw may repeat a few of them
_QUANTILES = (0.025, 0.975, 0.05, 0.95)


@dataclass(frozen=True)
class Estimate:
    """A difference with its 95 % and its 90 % interval."""

    value: float
    low: float
    high: float
    low_90: float
    high_90: float


@dataclass(frozen=True)
class Difference:
    """Difference of an arm to a rival (arm minus rival); below 0 the arm is better.

    Attributes:
        relative: as a share of the rival's loss.
        absolute: in nats per answer token.
        p_value: two-sided, of no relative difference.
        seeds: number of seeds that both ran with.
        rows: number of held-out rows.
        between_seeds: variance of one seed's relative difference over these rows; 0 with one seed.
        between_rows: variance of what a row contributes to the relative difference in all seeds alike; with one seed,
            in this seed.
        choices_over_rows: what the choice of both rates may have cost as far as the rows that choose tell, a standard
            error as a share of the rival's loss; 0 where nothing was chosen.
        choices_over_seeds: what the seeds that choose add to it, squared and added.
        rate_seeds: number of seeds that chose; 0 where nothing was chosen.
    """

    relative: Estimate
    absolute: Estimate
    p_value: float
    seeds: int
    rows: int
    between_seeds: float
    between_rows: float
    choices_over_rows: float = 0.0
    choices_over_seeds: float = 0.0
    rate_seeds: int = 0


@dataclass(frozen=True, eq=False)
class _Measure:
    """One difference before the draws: its value, the rival's loss in it, what each row adds, and its variances."""

    value: float
    level: float
    influence_R: FloatArray
    seeds: int
    between_seeds: float
    between_rows: float


def paired_differences(
    rival: Losses, arms: Sequence[Losses], seed: int = 0, row_draws: int = ROW_DRAWS
) -> list[Difference]:
    """Compute the difference of each arm to the rival, over the seeds that both ran with.

    All arms share the draws of rows.

    Args:
        rival: losses of the rival on the test half.
        arms: losses of the arms on the same rows.
        seed: seed of the draws.
        row_draws: number of draws of rows.

    Raises:
        AdaptiveConfigError: there are fewer than ``FEWEST_ROWS`` rows.
        ValueError: rows differ, an arm shares no seed with the rival, a run diverged, or the settings of some arms
            were chosen and those of others given.
    """
    if (rows := len(rival.tokens_R)) < FEWEST_ROWS:
        allowed = f"each half of the held-out rows needs at least {FEWEST_ROWS}, and the one that judges has {rows}"
        refuse("--held-out", 2 * rows, allowed, "--held-out 400")
    pairs = [_paired(rival, arm) for arm in arms]
    weight_R = rival.tokens_R / rival.tokens_R.mean()
    measures = [measure(*pair, weight_R) for pair in pairs for measure in (_relative, _absolute)]
    rng = np.random.default_rng(seed)
    student_BM = _studentised_draws(np.stack([each.influence_R for each in measures], axis=1), rng, row_draws)
    student_BM = _widened(student_BM, weight_R, rng)
    seed_draws = {n: rng.standard_t(n - 1, (row_draws, SEED_DRAWS)) for n in sorted({m.seeds for m in measures} - {1})}
    noises = [
        noise_of_runs(*pair, weight_R, each.between_seeds) for pair, each in zip(pairs, measures[::2], strict=True)
    ]
    costs = costs_of_choices(rival, arms, noises, np.random.default_rng([seed, 1]), row_draws)
    draws = (
        _draws(each, student_B, seed_draws, costs[place // 2].drawn_B)
        for place, (each, student_B) in enumerate(zip(measures, student_BM.T, strict=True))
    )
    return list(_differences(measures, draws, costs, 0 if rival.curve is None else rival.curve.seeds))


def _paired(rival: Losses, arm: Losses) -> tuple[FloatArray, FloatArray]:
    """Return the losses of the arm and of the rival for their common seeds, (S, R) each."""
    if not np.array_equal(rival.tokens_R, arm.tokens_R):
        raise ValueError("the held-out rows of an arm are not those of its rival")
    if not (common := rival.common_seeds(arm)):
        raise ValueError(f"no common seed: {arm.seeds} and {rival.seeds}")
    pair = arm.of_seeds(common), rival.of_seeds(common)
    if any(losses.diverged for losses in pair):
        raise ValueError("a run diverged")
    return pair[0].rows_SR, pair[1].rows_SR


def _relative(arm_SR: FloatArray, rival_SR: FloatArray, weight_R: FloatArray) -> _Measure:
    """Measure mean(w a) / mean(w b) - 1, whose influence is w (a - ratio b) / mean(w b)."""
    mean = float((weight_R * rival_SR).mean())
    if mean <= 0.0:
        raise ValueError(f"the rival's loss is {mean}: no difference can be told as a share of it")
    ratio = float((weight_R * arm_SR).mean()) / mean
    return _measure(ratio - 1.0, 1.0, weight_R * (arm_SR - ratio * rival_SR) / mean, weight_R)


def _absolute(arm_SR: FloatArray, rival_SR: FloatArray, weight_R: FloatArray) -> _Measure:
    """Measure mean(w (a - b)), whose influence is w (a - b - difference)."""
    value = float((weight_R * (arm_SR - rival_SR)).mean())
    return _measure(value, float((weight_R * rival_SR).mean()), weight_R * (arm_SR - rival_SR - value), weight_R)


def _measure(value: float, level: float, influence_SR: FloatArray, weight_R: FloatArray) -> _Measure:
    between_seeds, _ = variance_components(influence_SR)
    jackknifed_SR = influence_SR / (1.0 - weight_R / len(weight_R))
    _, between_rows = variance_components(jackknifed_SR)
    influence_R = jackknifed_SR.mean(axis=0)
    return _Measure(value, level, influence_R - influence_R.mean(), len(influence_SR), between_seeds, between_rows)


def variance_components(z_SR: FloatArray) -> tuple[float, float]:
    """Estimate the variance of a seed's mean over these rows, and that of what a row adds in all seeds alike.

    By the mean squares of the two-way layout with one value per cell (Searle, Casella and McCulloch 1992, Variance
    Components, chapter 4): in the words of the model, var(seed) + var(both)/R and var(row). The latter is at least 0.
    With one seed the former is 0, and the latter holds all that rows differ by.
    """
    S, R = z_SR.shape
    row_R, seed_S = z_SR.mean(axis=0), z_SR.mean(axis=1)
    if S == 1:
        return 0.0, float(row_R.var(ddof=1))
    residual_SR = z_SR - row_R - seed_S[:, None] + z_SR.mean()
    both = float((residual_SR**2).sum()) / ((S - 1) * (R - 1))
    return float(seed_S.var(ddof=1)), max(0.0, float(row_R.var(ddof=1)) - both / S)


def _studentised_draws(u_RM: FloatArray, rng: np.random.Generator, draws: int) -> FloatArray:
    """Draw rows with replacement: the mean of each draw, in its own standard errors; (B, M).

    Args:
        u_RM: values of the rows, with mean 0.
        rng: source of the draws.
        draws: number of draws.
    """
    R = len(u_RM)
    floor_M = _LEAST_ERROR * u_RM.std(axis=0) / math.sqrt(R - 1)
    parts = []
    for done in range(0, draws, _CHUNK):
        share_BR = _shares(rng.integers(R, size=(min(_CHUNK, draws - done), R)))
        mean_BM = share_BR @ u_RM
        error_BM = np.sqrt(np.maximum(share_BR @ u_RM**2 - mean_BM**2, 0.0) / (R - 1))
        error_BM = np.maximum(error_BM, floor_M)
        parts.append(np.divide(mean_BM, error_BM, out=np.zeros_like(mean_BM), where=error_BM > 0.0))
    return np.concatenate(parts)


def _widened(student_BM: FloatArray, weight_R: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Move draws that are nearer to 0 than Student's t of the same rank out to it, and return them sorted."""
    freedom = (weight_R**2).sum() ** 2 / (weight_R**4).sum()
    sorted_BM, student_B1 = np.sort(student_BM, axis=0), np.sort(rng.standard_t(freedom, len(student_BM)))[:, None]
    middle = len(student_BM) // 2
    parts = np.minimum(sorted_BM[:middle], student_B1[:middle]), np.maximum(sorted_BM[middle:], student_B1[middle:])
    return np.concatenate(parts)


def _shares(drawn_BR: npt.NDArray[np.int64]) -> FloatArray:
    """Convert the numbers of the rows drawn to the share of every row in its draw."""
    B, R = drawn_BR.shape
    counts = np.bincount((drawn_BR + R * np.arange(B)[:, None]).ravel(), minlength=B * R)
    share_BR: FloatArray = counts.reshape(B, R) / R
    return share_BR


def _draws(
    measure: _Measure, student_B: FloatArray, seed_draws: dict[int, FloatArray], cost_B: FloatArray
) -> FloatArray:
    """Add the deviations over rows, seeds and choices to the value: the differences compatible with the data."""
    over_rows = math.sqrt(measure.between_rows / len(measure.influence_R))
    draws_B1 = (measure.value - over_rows * student_B + measure.level * cost_B)[:, None]
    if measure.seeds == 1:
        return draws_B1
    over_seeds = math.sqrt(measure.between_seeds / measure.seeds)
    draws_BT: FloatArray = draws_B1 + over_seeds * seed_draws[measure.seeds]
    return draws_BT


def _differences(
    measures: Sequence[_Measure], draws: Iterator[FloatArray], costs: Sequence[CostOfChoices], rate_seeds: int
) -> Iterator[Difference]:
    for relative, absolute, cost in zip(measures[::2], measures[1::2], costs, strict=True):
        drawn, drawn_absolute = next(draws), next(draws)
        middle = float(np.median(cost.drawn_B))
        yield Difference(
            relative=_estimate(relative, drawn, middle),
            absolute=_estimate(absolute, drawn_absolute, middle),
            p_value=max(_two_sided(drawn), _two_sided(drawn - middle)),
            seeds=relative.seeds,
            rows=len(relative.influence_R),
            between_seeds=relative.between_seeds,
            between_rows=relative.between_rows,
            choices_over_rows=cost.over_rows,
            choices_over_seeds=cost.over_seeds,
            rate_seeds=rate_seeds,
        )


def _estimate(measure: _Measure, draws: FloatArray, middle: float) -> Estimate:
    """Read the intervals off the draws, as far as they reach with the middle of the costs of choices or without it.

    No arm's loss is below 0.
    """
    low, high, low_90, high_90 = map(float, np.quantile(draws, _QUANTILES))
    less, more = max(0.0, measure.level * middle), max(0.0, -measure.level * middle)
    low, low_90 = (max(-measure.level, each - less) for each in (low, low_90))
    return Estimate(measure.value, low, high + more, low_90, high_90 + more)


def _two_sided(draws: FloatArray) -> float:
    """Compute the p value of no difference; never 0, as so many draws cannot show less (Phipson and Smyth 2010)."""
    fewer = min(np.count_nonzero(draws <= 0.0), np.count_nonzero(draws >= 0.0))
    return min(1.0, 2.0 * (1 + int(fewer)) / (draws.size + 1))
