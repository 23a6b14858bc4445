"""Pictures of ranks as HTML: the numbers are the plan's, and names out of it stay text."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from llamafactory_adaptive.files import LOG_FILE
from llamafactory_adaptive.ranks.plan import ModulePlan
from llamafactory_adaptive.reports.rank_history import RankHistory, rank_history, read_rank_history
from llamafactory_adaptive.reports.rank_pictures import difference_heatmap, history_picture, rank_heatmap, share_bars
from llamafactory_adaptive.reports.svg import COLOURS, type_colours
from tests.helpers.plans import found_plan, make_plan


class Cells(HTMLParser):
    """The cells of a heat-map: place, text and title, as a browser takes them from the page."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.tags, self.inside = {}, set(), None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        facts = dict(attributes)
        self.inside = None
        if "cell" in facts.get("class", "").split():
            layer, kind = (int(re.search(rf"--{name}: (\d+)", facts["style"])[1]) - 2 for name in "lt")
            self.inside = (layer, kind)
            self.cells[self.inside] = ["", facts["title"]]

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.cells[self.inside][0] += data


def test_the_heatmap_has_a_cell_of_every_module_at_its_layer_and_type():
    cells = Cells(rank_heatmap(found_plan())).cells
    assert {place: text for place, (text, _) in cells.items()} == {(0, 0): "2", (0, 1): "6", (1, 0): "4", (1, 1): "0"}
    assert cells[0, 1][1] == "layer 0, down_proj: rank 6, 144 parameters"
    assert cells[1, 1][1] == "layer 1, down_proj: rank 0: no adapter"
    title = Cells(rank_heatmap(make_plan())).cells[1, 0][1]
    assert title == "layer 1, up_proj: rank 5, 50.00% of the score, 150 parameters"


def test_experts_share_a_cell_and_modules_outside_layers_have_a_column():
    experts = [ModulePlan(f"model.layers.0.mlp.experts.{i}.up_proj", 4, 4, rank=i) for i in (1, 2)]
    modules = (*experts, ModulePlan("lm_head", 4, 4, rank=3))
    cells = Cells(rank_heatmap(make_plan(modules=modules))).cells
    assert [text for text, _ in cells.values()] == ["1.5", "3"]
    assert "mean rank 1.5 of 2 modules" in cells[0, 0][1]
    assert cells[1, 1][1].startswith("lm_head: rank 3")


def test_the_difference_of_two_plans_is_theirs_module_by_module():
    cells = Cells(difference_heatmap(make_plan((3, 5)), make_plan((4, 2)))).cells
    assert [text for text, _ in cells.values()] == ["-1", "+3"]
    assert cells[1, 0][1] == "layer 1, up_proj: rank 5 here, 2 there"
    assert Cells(difference_heatmap(make_plan(), make_plan())).cells[0, 0][0] == "0"


def test_share_bars_tell_parameters_against_a_uniform_lora():
    page = share_bars(found_plan())
    # 12 of 12 ranks of 24 parameters each, half of them in either type, as in a uniform LoRA
    assert page.count("2 modules, mean rank 3.0, 144 parameters, 50.0% of all; 50.0% in a uniform LoRA") == 2
    assert "share of the score" not in page, "there is none"
    assert "share of the score" in share_bars(make_plan())


NASTY = "<script>alert(1)</script>"


@pytest.mark.parametrize("picture", [rank_heatmap, share_bars, lambda plan: difference_heatmap(plan, make_plan())])
def test_names_of_modules_stay_text(picture):
    plan = make_plan(modules=(ModulePlan(f'model.layers.0.{NASTY}"onload="x', 10, 20, 3),))
    page = picture(plan)
    assert "script" not in Cells(page).tags
    assert "&lt;script&gt;" in page


def test_names_stay_text_where_a_library_draws():
    page = history_picture(RankHistory((0, 2), {NASTY: (2.0, 1.0), "$x$": (1.0, 1.0)}), 4)
    assert "script" not in Cells(page).tags
    assert page.count("&lt;script&gt;") == 2, "in the wide and in the narrow form"
    assert "currentColor" in page
    assert "#010203" not in page


def test_a_plan_of_many_types_and_layers_is_drawn():
    modules = tuple(ModulePlan(f"m.{i}.type{i % 70}", 4, 4, 1) for i in range(200))
    assert len(Cells(rank_heatmap(make_plan(modules=modules))).cells) == 200


NAMES = [module.name for module in found_plan().modules]


def write_log(folder, *lines):
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "ran')


def test_the_history_has_the_mean_rank_of_each_type_at_every_change(tmp_path):
    assert read_rank_history(tmp_path, NAMES) is None
    write_log(tmp_path, {"step": 0, "event": "begin"}, {"step": 3, "event": "allocation", "ranks": [4, 5, 4, 1]})
    assert read_rank_history(tmp_path, NAMES) == RankHistory((3,), {"up_proj": (4.0,), "down_proj": (3.0,)})
    begin = {"step": 0, "event": "begin", "modules": NAMES, "ranks": [6, 6, 4, 6]}
    write_log(tmp_path, begin, {"step": 3, "event": "allocation", "ranks": [4, 5, 4, 1]}, {"step": 4})
    means = {"up_proj": (5.0, 4.0), "down_proj": (6.0, 3.0)}
    assert read_rank_history(tmp_path) == RankHistory((0, 3), means), "a run that trains has no plan yet"


def test_what_a_resumed_run_made_anew_counts_once(tmp_path):
    change = {"event": "allocation", "ranks": [1, 1, 1, 1]}
    resumed = {"step": 4, "event": "resumed"}
    write_log(tmp_path, {**change, "step": 2}, {**change, "step": 6}, resumed, {**change, "step": 5})
    assert read_rank_history(tmp_path, NAMES).steps == (2, 5)


def test_ranks_of_other_modules_are_no_history(tmp_path):
    assert rank_history(NAMES, {1: [1, 2]}) is None
    (tmp_path / LOG_FILE).write_text(
        'no json\n[1]\n{"step": "x"}\n{"step": 1, "ranks": "many"}\n{"step": 2, "ranks": ["a"]}\n'
    )
    assert read_rank_history(tmp_path, NAMES) is None


def test_equal_plans_give_equal_pages():
    plan = dataclasses.replace(found_plan())
    history = RankHistory((0, 2), {"up_proj": (2.0, 1.0)})
    for draw in (rank_heatmap, share_bars, lambda _: history_picture(history, 4, 9)):
        assert draw(plan) == draw(found_plan())


@pytest.mark.parametrize("count", [1, 7, 12, 40])
def test_each_module_type_has_a_colour_of_its_own_and_none_that_of_losses(count):
    colours = type_colours([f"type {number}" for number in range(count)])
    assert len(set(colours.values())) == len(colours) == count
    assert COLOURS[0] not in colours.values()
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours.values())
    assert list(colours.values())[:1] == list(type_colours(["another"]).values())
