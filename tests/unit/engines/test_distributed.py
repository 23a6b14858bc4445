"""Two processes agree or stop together, before any process group exists."""

import time
from pathlib import Path
from typing import Any

import pytest

from llamafactory_adaptive.errors import AdaptiveError, GuardError, OtherProcessError, PlanError
from tests.helpers.workers import said_by_two


def meet(rank: int, case: str) -> Any:
    from llamafactory_adaptive.engines import distributed
    from llamafactory_adaptive.planning.cache import wait_for_plan

    def refuse() -> None:
        raise PlanError("no plan here")

    if case == "agree":
        distributed.wait_for_all("a place")
        return distributed.gather("a place", lambda: rank)
    if case == "refused by rank 0":
        return distributed.from_main("a place", refuse)
    if case == "refused by rank 1":
        return distributed.gather("a place", refuse if rank == 1 else lambda: None)
    if case == "one waits for the other's plan":
        never = Path("/nowhere/plan.json")
        work = refuse if rank == 0 else lambda: wait_for_plan(never, 600.0, lambda: distributed.failure_of(0))
        return distributed.gather("the start", work)
    if case == "different":
        everyone = distributed.gather("a place", lambda: rank)
        return distributed.refuse_differences(everyone, "have another number")
    distributed.wait_for_all("a place")
    if rank == 1:
        time.sleep(4)
    return distributed.gather("the last place", lambda: rank, seconds=1.0) if rank == 0 else "late"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("agree", ["[0, 1]", "[0, 1]"]),
        ("refused by rank 0", ["PlanError: no plan here", "OtherProcessError: rank 0: no plan here"]),
        ("refused by rank 1", ["OtherProcessError: rank 1: no plan here", "PlanError: no plan here"]),
        ("one waits for the other's plan", ["PlanError: no plan here", "OtherProcessError: rank 0: no plan here"]),
        ("different", ["GuardError: ranks [1] have another number"] * 2),
        ("late", ["GuardError: rank 1 did not come to the last place within 1 s, or it has ended: see its own "
                  "messages", "late"]),
    ],
)  # fmt: skip
def test_processes_agree_or_stop_together_and_none_hangs(case: str, expected: list[str]) -> None:
    assert issubclass(OtherProcessError, AdaptiveError)
    assert issubclass(GuardError, AdaptiveError)
    assert said_by_two(meet, case) == expected
