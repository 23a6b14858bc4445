"""What is chosen, what is noted of it, and the plan it makes up."""

import json

import pytest

from llamafactory_adaptive.config.run_config import AdaptiveConfig, CalibrationConfig
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.ranks.search_config import ReallocationConfig
from llamafactory_adaptive.training.rank_search import RankSearchState


def search(**more):
    modules = more.pop("modules", (ModulePlan("a", 3, 5, rank=3), ModulePlan("b", 10, 10, rank=3)))
    start = RankPlan("igu", {}, "params", 2, 4.0, modules)
    settings = {"min_rank": 1, "max_rank": 8, "budget_unit": "params", **more}
    calibration = CalibrationConfig(None, 1, 1, 0)
    return RankSearchState(
        start,
        AdaptiveConfig("igu", {}, lora_rank=2, lora_alpha=4.0, plan_path=None, calibration=calibration, **settings),
    )


ALL = [[True] * 3, [True] * 3]


def test_the_budget_and_what_components_cost():
    decisions = search()
    assert decisions.final_budget == 2 * 8 + 2 * 20
    assert decisions.cost(ALL) == 3 * 8 + 3 * 20


def test_bounds_are_kept_and_nan_is_a_diverged_run():
    scores = [[9.0, 8.0, 7.0], [3.0, 2.0, 1.0]]
    assert search().choose(4, scores, 56, ALL) == [[True, True, True], [True, False, False]]
    assert search(max_rank=2).choose(4, scores, 56, ALL) == [[True, True, False], [True, True, False]]
    with pytest.raises(GuardError, match=r"step 4: module 0 .* not finite; training has diverged"):
        search().choose(4, [[float("inf"), 1.0, 1.0], [1.0] * 3], 56, ALL)


def test_what_servers_keep_packed_is_pruned_away_together_or_not_at_all():
    modules = tuple(ModulePlan(f"m.mlp.{kind}", 4, 4, rank=3) for kind in ("gate_proj", "up_proj", "down_proj"))
    decisions = search(min_rank=0, modules=modules)
    on = [[True] * 3] * 3
    gate = [[9.0, 8.0, 7.0], [3.0, 5.0, 1.0], [6.0, 5.5, 4.0]]
    chosen = decisions.choose(4, gate, 5 * 8, on)
    assert chosen == [[True] * 3, [False, True, False], [True, False, False]], "up_proj keeps its best"
    alone = [[0.3, 0.2, 0.1], [0.3, 0.2, 0.1], [6.0, 5.5, 4.0]]
    assert decisions.choose(4, alone, 3 * 8, on) == [[False] * 3, [False] * 3, [True] * 3]


def test_sensitivities_are_discounted_shares_in_which_new_components_do_not_count():
    decisions = search(budget_unit="ranks", search=ReallocationConfig(3, 0.25, 0.5, 0))
    on = [[True, True, False], [True, True, False]]
    # Means 3 and 1: shares 3/4 and 1/4 of four ranks. The module that grows turns on its third component.
    on = decisions.choose(4, [[4.0, 2.0, 0.0], [1.5, 0.5, 0.0]], 4, on)
    assert on == [[True, True, True], [True, False, False]]
    # Again 3 to 1 where components count; with the new one, 0, the mean of the first would be 2.
    decisions.choose(8, [[4.0, 2.0, 0.0], [1.0, 0.0, 0.0]], 4, on)
    assert decisions.sensitivities == [0.5 * 0.75 + 0.75, 0.5 * 0.25 + 0.25]
    # An interval later it counts: 2 and 6, shares 1/4 and 3/4.
    on = decisions.choose(12, [[4.0, 2.0, 0.0], [6.0, 0.0, 0.0]], 4, on)
    assert decisions.sensitivities == pytest.approx([0.5 * 1.125 + 0.25, 0.5 * 0.375 + 0.75])
    assert on == [[True, True, False], [True, True, False]]
    assert decisions.fresh == [[False] * 3, [False, True, False]]
    again = search(budget_unit="ranks", search=decisions.config.search)
    again.load(json.loads(json.dumps(decisions.state())))
    for resumed in (decisions, again):  # 3 and 9 where components count
        resumed.choose(16, [[4.0, 2.0, 0.0], [9.0, 0.0, 0.0]], 4, on)
        assert resumed.sensitivities == pytest.approx([0.5 * 0.8125 + 0.25, 0.5 * 0.9375 + 0.75])
    with pytest.raises(GuardError, match=r"step 20: module 1 .* not finite; training has diverged"):
        decisions.choose(20, [[4.0, 2.0, 0.0], [float("nan"), 1.0, 0.0]], 4, on)


def test_a_choice_is_noted_with_what_changed():
    decisions, scores = search(), [[9.0, 8.0, 7.0], [3.0, 2.0, 1.0]]
    first = decisions.record(4, 60, False, scores, ALL, [[True, False, False], [True, True, True]])
    assert (first["components_changed"], first["grown"], first["shrunk"], first["budget_used"]) == (2, 0, 1, 68)
    last = decisions.record(8, 56, True, scores, [[True, False, False], [True, True, True]],
                        [[True, True, True], [False, True, False]])  # fmt: skip
    assert (last["components_changed"], last["grown"], last["shrunk"], last["budget_used"]) == (4, 1, 1, 44)
    assert last["final"]
    assert decisions.final
    assert decisions.metrics["adaptive/mean_rank"] == 2.0
    assert [entry["step"] for entry in decisions.history] == [4, 8]
    again = search()
    again.load(decisions.state())
    assert again.state() == decisions.state()


def test_the_plan_found_carries_ranks_and_scores_of_what_is_in_use():
    decisions, masks = search(), [[True, True, False], [False, True, False]]
    decisions.record(8, 56, True, [[9.0, 8.0, 7.0], [3.0, 2.0, 1.0]], ALL, masks)
    plan = decisions.plan(masks)
    assert plan.ranks() == {"a": 2, "b": 1}
    assert [module.score for module in plan.modules] == [17.0, 2.0]
    assert sum(module.share for module in plan.modules) == pytest.approx(1.0)
