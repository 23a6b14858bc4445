"""The budget over steps, against steps worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.ranks.schedule import (
    Refreshes,
    Schedule,
    SingleCut,
    interval_steps,
    make_schedule,
    short_run_warning,
)
from llamafactory_adaptive.ranks.search_config import ExchangeConfig, PruningConfig, ReallocationConfig


def pruning(warmup=0.1, final=0.3, interval=10):
    return PruningConfig(16, warmup, final, interval, None, 0)


def test_the_cubic_budget_at_steps_worked_out_by_hand():
    plan = make_schedule(pruning(), 100, 1600, 800)
    assert (plan.begin, plan.end) == (10, 70)
    assert [plan.budget(t) for t in (0, 10, 40, 70, 100)] == [1600, 1600, 900, 800, 800]  # (1/2)^3 of 800 is 100
    assert [t for t in range(101) if plan.due(t)] == [20, 30, 40, 50, 60, 70]
    assert [plan.is_final(t) for t in (69, 70, 71)] == [False, True, True]


@given(
    total=st.integers(1, 5000),
    warmup=st.floats(0, 0.6),
    final=st.floats(0, 0.39),
    interval=st.integers(1, 50),
    start=st.integers(10, 10**6),
)
def test_the_budget_only_falls_and_there_is_always_one_final_allocation(total, warmup, final, interval, start):
    plan = make_schedule(pruning(warmup, final, interval), total, start, start // 2)
    budgets = [plan.budget(t) for t in range(total + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == start or plan.begin == 0
    assert 0 <= plan.begin < plan.end <= total
    assert plan.due(plan.end)
    assert plan.budget(plan.end) == start // 2
    assert not any(plan.due(t) for t in range(plan.end + 1, total + 1))


def by_epochs(share):
    return PruningConfig(16, 0.2, 0.5, None, None, 0, interval_epochs=share)


@pytest.mark.parametrize(
    ("share", "epoch", "steps"),
    [(0.2, 45, 9), (0.2, 234, 47), (0.2, 4, 1), (0.001, 10, 1), (1.0, 7, 7), (2.5, 10, 25)],
)
def test_a_share_of_an_epoch_becomes_whole_steps(share, epoch, steps):
    assert interval_steps(by_epochs(share), epoch) == steps
    assert interval_steps(pruning(interval=3), None) == 3, "steps need no epoch"


def test_ranks_are_pruned_every_fifth_of_an_epoch_from_the_second_to_the_fifth_of_ten():
    plan = make_schedule(by_epochs(0.2), 450, 3200, 1600, epoch_steps=45)
    assert (plan.begin, plan.end) == (90, 225)
    assert [t for t in range(451) if plan.due(t)] == list(range(99, 226, 9)), "five times in each of three epochs"
    assert plan.describe("parameters") == (
        "3,200 parameters, pruned to 1,600 every 9 steps (0.2 of an epoch) between steps 90 and 225"
    )


def test_a_share_of_an_epoch_without_known_steps_is_refused_with_the_key_in_steps():
    with pytest.raises(AdaptiveConfigError, match=r"adaptive_interval_epochs: 0.2 .*no known length.*try adaptive_in"):
        make_schedule(by_epochs(0.2), 450, 3200, 1600)


def test_ratios_of_max_steps_scale():
    short, long = (make_schedule(pruning(), n, 10**6, 10**5) for n in (100, 1000))
    assert all(short.budget(t) == long.budget(10 * t) for t in range(101))


def test_a_step_is_judged_by_whole_numbers():
    assert Schedule(0, 3, 1, 10**18 + 7, 7).budget(2) == 7 + 10**18 // 27


@pytest.mark.parametrize(("final", "at"), [(0.3, 70), (0.0, 100), (0.999, 1)])
def test_a_single_cut_comes_where_ranks_become_final(final, at):
    plan = make_schedule(PruningConfig(16, 0.0, final, None, None, 0), 100, 1600, 800)
    assert isinstance(plan, SingleCut)
    assert [step for step in range(101) if plan.due(step)] == [at]
    assert [plan.budget(step) for step in (0, at - 1, at, 100)] == [1600, 1600, 800, 800]
    assert not plan.is_final(at - 1)
    assert plan.is_final(at)
    assert plan.describe("ranks") == f"1,600 ranks, cut to 800 at step {at}"
    assert short_run_warning(plan, 100) is None, "one choice is what is meant"


def test_exchanges_come_at_equal_distances_after_the_warm_up_and_leave_the_budget_as_it_is():
    plan = make_schedule(ExchangeConfig(32, 0.1, 0.3, 20, 0), 100, 790, 800)
    assert [t for t in range(101) if plan.due(t)] == [20, 40, 60, 70]
    assert [plan.budget(t) for t in (0, 40, 100)] == [800] * 3
    assert [plan.progress(t) for t in (0, 10, 40, 70, 100)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert [t for t in range(101) if plan.is_final(t)] == list(range(70, 101))
    assert plan.describe("ranks") == "800 ranks, exchanged every 20 steps between steps 10 and 70"
    plan = make_schedule(ExchangeConfig(32, 0.1, 0.3, None, 0, interval_epochs=0.5), 100, 790, 800, epoch_steps=60)
    assert plan.describe("ranks") == "800 ranks, exchanged every 30 steps (0.5 of an epoch) between steps 10 and 70"
    warning = short_run_warning(plan, 100)
    assert warning.startswith("ranks are chosen only 2 times between steps 10 and 70")
    assert "adaptive_interval" not in warning, "new components need the time"


def test_refreshes_come_at_equal_distances_and_never_at_the_very_end():
    plan = make_schedule(ReallocationConfig(32, 0.25, 0.85, 0), 100, 800, 800)
    assert [t for t in range(101) if plan.due(t)] == [25, 50, 75]
    assert plan.is_final(75)
    assert not plan.is_final(74)
    assert plan.budget(0) == plan.budget(100) == 800
    assert [t for t in range(13) if make_schedule(ReallocationConfig(32, 0.25, 0.85, 0), 12, 8, 8).due(t)] == [3, 6, 9]
    assert make_schedule(ReallocationConfig(32, 0.5, 0.85, 0), 1, 8, 8).due(1), "even one step ends with an allocation"


@pytest.mark.parametrize(
    ("schedule", "total", "said"),
    [
        (Schedule(0, 1, 10, 100, 50), 1, "chosen only once between steps 0 and 1 of 1"),
        (Schedule(10, 70, 100, 100, 50), 100, "adaptive_interval: 6"),
        (Schedule(10, 70, 100, 100, 50, 2.0), 100, "adaptive_interval_epochs: 0.12"),
        (Schedule(10, 70, 20, 100, 50), 100, "chosen only 4 times between steps 10 and 70 of 100"),
        (Refreshes(5, 5, 100), 9, "chosen only once"),
    ],
)
def test_runs_too_short_for_their_schedule_are_warned_of(schedule, total, said):
    assert said in short_run_warning(schedule, total)
    assert "max_steps" in short_run_warning(schedule, total)


def test_a_schedule_with_room_is_not():
    assert short_run_warning(Schedule(10, 70, 10, 100, 50), 100) is None
    assert short_run_warning(Refreshes(25, 75, 100), 100) is None
