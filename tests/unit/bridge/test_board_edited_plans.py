"""Ranks that a person edits in the board's table: the plan that they become, and what is refused."""

import dataclasses
import re

import pytest


pytest.importorskip("gradio")
from llamafactory.webui import interface  # applies the seams

from llamafactory_adaptive.bridge.board import plan_preview
from llamafactory_adaptive.bridge.board.command import Progress
from llamafactory_adaptive.bridge.board.plan_preview import use_edited
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.planning.compatibility import check_plan
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.reports.plaintext import markdown
from tests.helpers.plans import make_plan, plan_request


@pytest.fixture
def folder(tmp_path_factory, monkeypatch):
    """The working folder of the board."""
    folder = tmp_path_factory.mktemp("board")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def plan_file(tmp_path):
    make_plan().save(tmp_path / PLAN_FILE)
    return tmp_path / PLAN_FILE


def test_edited_ranks_become_a_plan(folder, plan_file):
    names = [module.name for module in make_plan().modules]
    shown, path = use_edited(str(plan_file), [[names[0], 7.0, "", ""], [names[1], 1, "", ""]], "en")
    plan = load_plan(folder / path)
    assert list(plan.ranks().values()) == [7, 1]
    assert shown["status"] == "The edited ranks are used: 240 of 240 parameters."
    assert load_plan(plan_file).ranks() == make_plan().ranks()


@pytest.mark.parametrize(("unit", "said"), [
    ("params", "Not used: 300 of 240 parameters are 60 too many. Lower a rank, or raise the budget to 5."),
    ("ranks", "Not used: 10 of 8 ranks are 2 too many. Lower a rank, or raise the budget to 5."),
])  # fmt: skip
def test_edited_ranks_above_the_budget_are_refused_until_it_is_raised(folder, plan_file, unit, said):
    plan = make_plan()
    rows = [[module.name, 5, "", ""] for module in plan.modules]
    before = set(folder.rglob("plan-*.json"))
    assert use_edited(str(plan_file), rows, "en", 4, unit) == ({"status": said}, "")
    assert set(folder.rglob("plan-*.json")) == before
    shown, path = use_edited(str(plan_file), rows, "en", 5, unit)
    assert shown["status"].startswith("The edited ranks are used: ")
    assert load_plan(folder / path).lora_rank == 5


def test_what_is_said_of_edited_ranks_above_the_budget_holds_at_the_start(folder, plan_file):
    rows = [[module.name, 6, "", ""] for module in make_plan().modules]
    shown, _ = use_edited(str(plan_file), rows, "en")
    named = int(re.search(r"raise the budget to (\d+)\.$", shown["status"]).group(1))
    shapes = list(make_plan().modules)
    plan = load_plan(folder / use_edited(str(plan_file), rows, "en", named)[1])
    config = plan_request().config
    assert check_plan(plan, shapes, dataclasses.replace(config, lora_rank=named), "plan").ranks() == plan.ranks()
    with pytest.raises(PlanError, match="too many"):
        check_plan(plan, shapes, dataclasses.replace(config, lora_rank=named - 1), "plan")


@pytest.mark.parametrize("rank", [-1, 2.5, 11, "many", None, float("nan")])
def test_an_impossible_rank_is_told_with_its_module(folder, plan_file, rank):
    name = make_plan().modules[0].name
    shown, path = use_edited(str(plan_file), [[name, rank, "", ""]], "en")
    assert path == ""
    assert shown["status"] == f"{markdown(name)}: the rank must be a whole number from 0 to 10."


def test_without_a_plan_nothing_is_edited(folder, tmp_path):
    assert use_edited("", [], "en") == ({"status": "Preview a plan first."}, "")
    assert use_edited(str(tmp_path / "gone.json"), [], "en")[1] == ""


def test_edited_ranks_are_held_against_the_budget_that_the_panel_has_by_now(folder, plan_file):
    built = interface.create_ui()
    (engine,) = {fn.fn.__self__ for fn in built.fns.values() if getattr(fn.fn, "__name__", "") == "change_lang"}
    (use,) = [fn for fn in built.fns.values() if getattr(fn.fn, "__name__", "") == "use"]
    held = dict.fromkeys(use.inputs)
    held |= {engine.manager.get_elem_by_id(f"adaptive.adaptive_{name}"): value for name, value in (
        ("rank_table", [[module.name, 5, "", ""] for module in make_plan().modules]), ("budget", 5),
        ("budget_unit", "params"))}  # fmt: skip
    held[engine.manager.get_elem_by_id("top.lang")] = "en"
    plan, field = str(plan_file), engine.manager.get_elem_by_id("adaptive.adaptive_plan")
    assert field in use.fn(*(plan if value is None else value for value in held.values()))
    held[engine.manager.get_elem_by_id("adaptive.adaptive_budget")] = 4
    assert field not in use.fn(*(plan if value is None else value for value in held.values()))


def test_a_plan_of_too_many_modules_for_a_table_is_downloaded_and_the_reason_told(folder, plan_file, monkeypatch):
    done = Progress(9, "the table", "", 0)
    shown = plan_preview._outcome(done, plan_file, "en")
    assert (shown["edit_box"].visible, shown["plan_file"].visible) == (True, True)
    monkeypatch.setattr(plan_preview, "_MOST_ROWS", 1)
    shown = plan_preview._outcome(done, plan_file, "en")
    assert (shown["edit_box"].visible, shown["plan_file"].visible) == (False, True)
    assert "2 modules are too many to edit here (at most 1): download the plan," in shown["status"]


def test_the_download_of_a_plan_is_not_in_the_box_that_large_plans_hide():
    built = interface.create_ui()
    named = {block.elem_id: block for block in built.blocks.values() if getattr(block, "elem_id", None)}
    above, box = named["adaptive_plan_file"], named["adaptive_edit_box"]
    while above is not None:
        assert above is not box
        above = above.parent
