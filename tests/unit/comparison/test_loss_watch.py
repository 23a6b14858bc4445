"""When the losses of single steps say that a run diverges."""

import math

import pytest

from llamafactory_adaptive.comparison.loss_watch import LossWatch


NAN = math.nan


def verdicts(losses, skipped=False):
    watch = LossWatch()
    return [bool(watch.see(loss, skipped)) for loss in losses]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([2.0, NAN, NAN, NAN], 4),  # at the third in a row
        ([2.0, math.inf, NAN, 2.0, NAN, NAN], None),  # never three in a row
        ([NAN, NAN, NAN], 3),
        ([2.0] + [6.1] * 10, 11),  # more than three times the first, ten times in a row
        ([2.0] + [6.1] * 9 + [5.9] + [6.1] * 9, None),
        ([2.0] + [5.9] * 50, None),
    ],
)
def test_a_run_diverges_by_many_bad_steps_in_a_row(losses, steps):
    said = verdicts(losses)
    assert said.index(True) + 1 == steps if steps else not any(said)


def test_steps_that_a_loss_scaler_skips_are_usual_and_end_a_run_only_where_it_skips_them_all():
    assert not any(verdicts([2.0] * 39, skipped=True))
    assert verdicts([2.0] * 40, skipped=True)[-1]
    watch = LossWatch()
    assert not any(watch.see(2.0, skipped=step % 3 != 0) for step in range(200)), "found again and again"


def test_the_reason_is_said():
    watch = LossWatch()
    assert [watch.see(NAN) for _ in range(3)][-1] == "the loss was not finite for 3 steps in a row"
