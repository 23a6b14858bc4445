"""Arms of the benchmark of methods: each can be run at every budget, and tells what its name says."""

import pytest

from llamafactory_adaptive import rank_search
from tests.helpers.benchmarks import import_benchmarks
from tests.helpers.tiny import tiny_model


@pytest.fixture(scope="module")
def method_arms():
    return import_benchmarks("method_arms")["method_arms"]


@pytest.mark.parametrize("rank", [4, 2, 1])
def test_every_search_can_begin_at_every_budget(method_arms, rank):
    searches = [arm for arm in method_arms.ARMS if method_arms.of_budget(arm, rank)[0] in ("igu", "adalora")]
    assert len(searches) >= 40
    for arm in searches:
        method, options = method_arms.of_budget(arm, rank)
        rank_search(tiny_model(), method, lora_rank=rank, **options)


def test_only_the_uniform_arm_takes_its_lowest_rank_from_the_budget(method_arms):
    """A value that happens to be a key's name is not the budget."""
    differing = [arm for arm in method_arms.ARMS if method_arms.of_budget(arm, 3) != method_arms.of_budget(arm, 5)]
    assert differing == ["corrected, uniform ranks"]
    assert method_arms.of_budget("corrected, uniform ranks", 3)[1] == {"min_rank": 3}


def test_every_base_is_an_arm(method_arms):
    bases = {arm: method_arms.base_of(arm) for arm in method_arms.ARMS}
    assert set(filter(None, bases.values())) | set(method_arms.BASES) <= set(method_arms.ARMS)
    assert bases["lora"] is None
    assert bases["corrected, shrink"] == "corrected"
