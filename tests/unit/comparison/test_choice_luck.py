"""The whole procedure, choice of the rate included, on arms that are all the same: how often is one called better?

A run's seed moves the losses of both halves alike: the luckiest of many runs looks good on the rows that judge, too.
"""

import math

import numpy as np

from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.differences import paired_differences
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.comparison.losses import Losses
from llamafactory_adaptive.comparison.results import arm_results


ARMS, ROWS, SEED_SD, ROW_SD = 400, 40, 0.004, 0.002
DESIGN = Design(tuple(2.0**power for power in range(9)), seeds=3, extensions=0)
TOKENS = [5] * ROWS


def outcome(run):
    """Losses around 1 whatever the rate; a seed of an arm at a rate moves all rows."""
    rng = np.random.default_rng([int(run.arm), int(run.point.rate), run.seed])
    losses = 1.0 + SEED_SD * rng.standard_normal() + ROW_SD * rng.standard_normal((2, ROWS))
    return {"status": "done", "dev": losses[0].tolist(), "test": losses[1].tolist()}


def differences(losses):
    seeds = losses[0].seeds
    rival = Losses(seeds, np.ones((len(seeds), ROWS)), np.array(TOKENS, float))
    return paired_differences(rival, losses, row_draws=400)


def better(found):
    """The share of arms that are better at 5 %, two-sided: one in forty where there is no difference."""
    return np.mean([each.p_value <= 0.05 and each.relative.value < 0.0 for each in found])


def test_choosing_among_nine_rates_makes_no_arm_better():
    arms = [Arm(str(number)) for number in range(ARMS)]
    progress = Progress(DESIGN, arms, outcome, lambda found, half: float(np.mean(found[half])))
    results = arm_results(progress)
    assert len({result.choice.best for result in results}) == 9, "every rate is the best of some arm"
    found = differences([result.losses(TOKENS) for result in results])
    assert better(found) <= 0.025 + 2.5 * math.sqrt(0.025 * 0.975 / ARMS)
    error = SEED_SD / math.sqrt(DESIGN.seeds * ARMS)
    assert abs(np.mean([each.relative.value for each in found])) < 3.0 * error
    # The simulation tells: counted among those that judge, the run that chose would have made the arms look better.
    biased = differences([with_the_run_that_chose(result) for result in results])
    assert np.mean([each.relative.value for each in biased]) < -6.0 * error
    assert better(biased) > better(found)


def with_the_run_that_chose(result):
    """The losses of an arm as they would be if the seed that chose took the place of the last one that judges."""
    chose = outcome(Run(result.arm.name, result.choice.best, 0, None))["test"]
    rows = [*(found["test"] for found in list(result.finals.values())[:-1]), chose]
    return Losses((1, 2, 3), np.array(rows), np.array(TOKENS, float))
