"""Two processes agree or stop together, before any process group exists."""

import random
import time
from typing import Any

import pytest

from llamafactory_adaptive.errors import AdaptiveError, GuardError, OtherProcessError, PlanError
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan, parse_plan
from tests.helpers.workers import said_by_two


def meet(rank: int, case: str) -> Any:
    from llamafactory_adaptive.engines import distributed

    def refuse() -> None:
        raise PlanError("no plan here")

    if case == "agree":
        distributed.wait_for_all("a place")
        return distributed.gather("a place", lambda: rank)
    if case == "refused by rank 0":
        return distributed.from_main("a place", refuse)
    if case == "refused by rank 1":
        return distributed.gather("a place", refuse if rank == 1 else lambda: None)
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
        ("different", ["GuardError: ranks [1] have another number"] * 2),
        ("late", ["GuardError: rank 1 did not come to the last place within 1 s, or it has ended: see its own "
                  "messages", "late"]),
    ],
)  # fmt: skip
def test_processes_agree_or_stop_together_and_none_hangs(case: str, expected: list[str]) -> None:
    assert issubclass(OtherProcessError, AdaptiveError)
    assert issubclass(GuardError, AdaptiveError)
    assert said_by_two(meet, case) == expected


class SlowStore:
    """A store whose answers come late."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def wait(self, *words: Any) -> None:
        time.sleep(0.5)
        self.store.wait(*words)


def end_after_an_answer(rank: int) -> None:
    """Rank 0, with which the store ends, raises as soon as it has the answer."""
    from llamafactory_adaptive.engines import distributed

    if rank == 1:
        store = SlowStore(distributed._store())
        distributed._store = lambda: store
    checkpoint = distributed.from_main("the search for a good checkpoint", lambda: "checkpoint-3")
    raise GuardError(f"training diverged, resume from {checkpoint}")


def send_a_large_plan(rank: int) -> str:
    """More than torch's store takes as one value; packed it is less, and pieces are made smaller still."""
    from llamafactory_adaptive.engines import distributed

    distributed._PIECE_BYTES = 2**20
    draw = random.Random(5).random
    modules = tuple(
        ModulePlan(f"model.layers.{i}.mlp.up_proj", 64, 64, 4, draw(), draw(), {f"m{n}": draw() for n in range(4)})
        for i in range(50_000)
    )
    plan = RankPlan("random", {}, "params", 4, 8.0, modules)
    sent = distributed.from_main("the plan", plan.to_json)
    pieces = len([key for key in distributed._last_keys if key.startswith("0/0/") and not key.endswith("read")])
    distributed.wait_for_all("a place that all reach once the plan was read")
    if rank == 1:
        return str(parse_plan(sent, "what came").modules == modules)
    left = [distributed._store().check([f"0/0/{number}"]) for number in range(pieces)]
    return f"in pieces: {pieces > 1}, some left: {any(left)}"


def test_a_plan_of_50_000_modules_reaches_the_others():
    assert said_by_two(send_a_large_plan) == ["in pieces: True, some left: False", "True"]


def test_what_all_processes_end_with_reaches_the_slowest():
    assert said_by_two(end_after_an_answer) == ["GuardError: training diverged, resume from checkpoint-3"] * 2
