"""The whole procedure, choice of the rate included, on arms that are all the same: how often is one called better?

A run's seed moves the losses of both halves alike: the luckiest of many runs looks good on the rows that judge, too.
"""

import math
from dataclasses import replace

import numpy as np

from llamafactory_adaptive.comparison.arms import Arm
from llamafactory_adaptive.comparison.differences import paired_differences
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.comparison.losses import Losses
from llamafactory_adaptive.comparison.results import arm_results


ARMS, ROWS, SEED_SD, ROW_SD = 400, 40, 0.004, 0.002
DESIGN = Design(tuple(2.0**power for power in range(9)), seeds=3, extensions=0)
TOKENS = {"dev": [5] * ROWS, "test": [5] * ROWS}
# Ten seeds judge; a rate beside the best costs about as much as another seed changes.
U_SHAPED, PAIRS, BEND = Design(tuple(2.0**power for power in range(5)), seeds=10, extensions=0), 300, 0.004


def outcome(run):
    """Losses around 1 whatever the rate; a seed of an arm at a rate moves all rows."""
    rng = np.random.default_rng([int(run.arm), int(run.point.rate), run.seed])
    losses = 1.0 + SEED_SD * rng.standard_normal() + ROW_SD * rng.standard_normal((2, ROWS))
    return {"status": "done", "dev": losses[0].tolist(), "test": losses[1].tolist()}


def differences(losses):
    seeds = losses[0].seeds
    rival = Losses(seeds, np.ones((len(seeds), ROWS)), np.array(TOKENS["test"], float))
    return paired_differences(rival, losses, row_draws=400)


def mean_of(found, half):
    return float(np.mean(found[half]))


def better(found):
    """The share of arms that are better at 5 %, two-sided: one in forty where there is no difference."""
    return np.mean([each.p_value <= 0.05 and each.relative.value < 0.0 for each in found])


def test_choosing_among_nine_rates_makes_no_arm_better():
    arms = [Arm(str(number)) for number in range(ARMS)]
    progress = Progress(DESIGN, arms, outcome, mean_of)
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
    return Losses((1, 2, 3), np.array(rows), np.array(TOKENS["test"], float))


def u_shaped(run):
    """The same, over a curve whose lowest point is between two rates, elsewhere for each pair of arms."""
    pair = np.random.default_rng(int(run.arm) // 2)
    away = math.log2(run.point.rate) - 1.0 - pair.random()
    found = outcome(run)
    return {**found, **{half: [loss + BEND * away**2 for loss in found[half]] for half in ("dev", "test")}}


def wrong(pairs):
    """The share of pairs of equal arms of which one is called better."""
    found = [paired_differences(rival, [arm], row_draws=400)[0] for rival, arm in pairs]
    assert all(
        (each.over_choices > 0.0) == (arm.curve is not None) for each, (_, arm) in zip(found, pairs, strict=True)
    )
    return np.mean([each.p_value <= 0.05 for each in found])


def test_rates_that_chance_chose_make_no_arm_better():
    """Two arms with the same curve are judged at different rates, between which there is a difference."""
    arms = [Arm(str(number)) for number in range(2 * PAIRS)]
    results = arm_results(Progress(U_SHAPED, arms, u_shaped, mean_of))
    losses = [result.losses(TOKENS) for result in results]
    pairs = list(zip(losses[::2], losses[1::2], strict=True))
    rates = [result.choice.best.rate for result in results]
    assert 0.3 < np.mean([one != other for one, other in zip(rates[::2], rates[1::2], strict=True)]) < 0.9
    assert wrong(pairs) <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / PAIRS)
    # The simulation tells: were the rates taken as given, far more pairs than one in twenty would differ.
    assert wrong([tuple(replace(each, curve=None) for each in pair) for pair in pairs]) > 0.12
