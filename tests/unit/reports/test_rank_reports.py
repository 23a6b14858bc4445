"""What people see: numbers in tables are the plan's numbers, warnings come when they should."""

import dataclasses
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from llamafactory_adaptive.ranks.plan import ModulePlan
from llamafactory_adaptive.reports import plots
from llamafactory_adaptive.reports.model_card import update_card
from llamafactory_adaptive.reports.plots import save_heatmap, save_history
from llamafactory_adaptive.reports.tables import closing_words, concentration_warning, rank_table
from tests.helpers.plans import found_plan, make_plan


def test_table_shows_ranks_totals_and_size():
    text = rank_table(make_plan())
    assert text.splitlines()[1:4] == ["layer  up_proj", "    0        3", "    1        5"]
    assert "trainable parameters  240 of 240 (uniform LoRA of rank 4): 100.000%" in text
    assert "adapter size          0.0 MB in fp32" in text
    assert "    up_proj        2        4.0    3-5  100.0%         240" in text


def test_experts_of_a_layer_share_a_cell():
    experts = tuple(ModulePlan(f"model.layers.0.mlp.experts.{i}.up_proj", 4, 4, rank=i) for i in (1, 2))
    assert "    0      1.5" in rank_table(dataclasses.replace(make_plan(), modules=experts))


def skewed(shares):
    modules = tuple(ModulePlan(f"m.{i}.w", 99, 99, rank=1, share=share) for i, share in enumerate(shares))
    return dataclasses.replace(make_plan(), modules=modules)


def test_warning_only_when_few_modules_hold_most():
    assert concentration_warning(skewed([1 / 40] * 40), upper=8) is None
    text = concentration_warning(skewed([0.4, 0.4, *[0.2 / 38] * 38]), upper=8)
    assert text == "2 of 40 modules hold 80% of the score, 0 sit at their largest rank"
    assert concentration_warning(skewed([1 / 40] * 40), upper=1)


def test_model_card_section_is_replaced_not_repeated(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# my model\n\nkept text\n")
    update_card(card, make_plan())
    update_card(card, make_plan((4, 4)))
    text = card.read_text()
    assert text.startswith("# my model\n\nkept text\n")
    assert text.count("## Adaptive ranks") == 1
    assert "| up_proj | 2 | 4.0 | 4-4 |" in text


END = "<!-- /llamafactory-adaptive -->"
NASTY = [
    "<b>x</b>",
    "[x](http://y)",
    "\x1b[2J\x1b]0;x\x07",
    END,
    r"$\\frac$",
    "$x$",
    "a|b\nc",
    "\u202e",
    "\ud800",
    "_x",
]
TEXTS = st.one_of(st.sampled_from(NASTY), st.text(st.characters(), max_size=30))


def named(method, kind):
    modules = (ModulePlan(f"model.layers.0.{kind}", 10, 20, 3), ModulePlan("model.layers.1.mlp.up_proj", 10, 20, 5))
    return make_plan(method=method, modules=modules)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS)
def test_nothing_in_a_plan_gets_out_of_its_section(method, kind):
    plan = named(method, kind)
    text = rank_table(plan)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    with tempfile.TemporaryDirectory() as folder:
        card = Path(folder) / "README.md"
        card.write_text("mine\n")
        for _ in range(2):
            update_card(card, plan)
        written = card.read_text()
        assert written.startswith("mine\n\n<!-- llamafactory-adaptive: ranks -->")
        assert written.endswith(END + "\n")
        assert written.count("<!--") == written.count("-->") == 2
        assert "<b>" not in written
        assert written.count("](") == 1  # the picture's


def test_text_around_the_section_stays_byte_for_byte(tmp_path):
    card = tmp_path / "README.md"
    start = b"<!-- llamafactory-adaptive: ranks -->"
    card.write_bytes(b"caf\xe9 " + start + b" a start of my own\n")
    for _ in range(2):
        update_card(card, make_plan())
    card.write_bytes(card.read_bytes() + b"after\xff")
    update_card(card, make_plan((4, 4)))
    text = card.read_bytes()
    assert text.startswith(b"caf\xe9 " + start + b" a start of my own\n")
    assert text.endswith(b"after\xff")
    assert text.count(b"## Adaptive ranks") == 1


def test_closing_words_name_ranks_cost_files_and_what_follows(tmp_path):
    for name in ("adaptive_rank_plan.json", "adaptive_ranks.png"):
        (tmp_path / name).write_text("")
    said = closing_words(found_plan(), tmp_path, 5.0, 20.0, ["mind this"], "talk --to it")
    assert "Adaptive ranks (igu), 3 of 4 modules" in said
    assert [line.split()[:4] for line in said.splitlines() if "_proj" in line] == [
        ["up_proj", "2", "3.0", "2-4"], ["down_proj", "2", "3.0", "0-6"]]  # fmt: skip
    assert "finding ranks took 5.0 of 20.0 s (25.0%)" in said
    assert f"in {tmp_path}: adaptive_rank_plan.json, adaptive_ranks.png" in said
    assert "warning: mind this" in said
    assert f"llamafactory-adaptive report {tmp_path}" in said
    assert said.endswith("\n  talk --to it")


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were drawn; they are written, too."""
    return record_figures(monkeypatch)


def record_figures(monkeypatch):
    figures, save = [], plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def cells(figure):
    """Ranks by type and layer as the picture has them; -1 where there is no module."""
    return figure.axes[0].images[0].get_array().filled(-1).tolist()


def test_the_heatmap_shows_the_plan_and_is_written_as_a_picture_of_its_size(drawn, tmp_path):
    save_heatmap(make_plan(), tmp_path / "new" / "ranks.png")
    (figure,) = drawn
    axes, scale = figure.axes
    assert cells(figure) == [[3, 5]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert axes.get_title() == "sensitivity: 240 parameters, the cost of uniform rank 4"
    assert (scale.get_ylabel(), axes.images[0].get_clim()) == ("rank", (0, 5))
    height, width, _ = imread(tmp_path / "new" / "ranks.png").shape
    assert (width, height) == (6.0 * 130, int((1.4 + 0.42) * 130)), "inches at 130 dots each"


@settings(max_examples=15, deadline=None)
@given(TEXTS, TEXTS)
def test_a_picture_is_drawn_whatever_a_plan_calls_things(method, kind):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        figures = record_figures(patch)
        save_heatmap(named(method, kind), Path(folder) / "x.png")
        assert imread(Path(folder) / "x.png").size > 0
    assert sorted(rank for row in cells(figures[0]) for rank in row if rank >= 0) == [3, 5]


def test_a_plan_of_very_many_types_is_still_a_picture(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    modules = tuple(ModulePlan(f"m.0.type{i}", 4, 4, 1 + i % 3) for i in range(300))
    save_heatmap(make_plan(modules=modules), tmp_path / "x.png")
    assert cells(figures[0]) == [[1 + i % 3] for i in range(300)]
    assert figures[0].get_size_inches().tolist() == [6.0, 120.0], "matplotlib refuses much larger ones"


def test_the_heatmap_has_the_rank_of_each_layer_and_type_and_gaps_where_there_is_no_module(drawn, tmp_path):
    modules = (*found_plan().modules, ModulePlan("model.layers.1.self_attn.q_proj", 8, 8, rank=5))
    save_heatmap(dataclasses.replace(found_plan(), modules=modules), tmp_path / "x.png")
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["up_proj", "down_proj", "q_proj"]
    assert cells(drawn[0]) == [[2, 4], [6, 0], [-1, 5]]


def test_the_history_shows_mean_ranks_of_each_type_from_the_start_to_the_last_step(drawn, tmp_path):
    start = dataclasses.replace(
        found_plan(), modules=tuple(dataclasses.replace(m, rank=6) for m in found_plan().modules)
    )
    first = [[True] * 6, [True] * 6, [True] * 4 + [False] * 2, [True] * 6]
    history = [{"step": 3, "ranks": [4, 5, 4, 1]}, {"step": 6, "ranks": [2, 6, 4, 0]}]
    save_history(start, first, history, 9, tmp_path / "x.png")
    axes = drawn[0].axes[0]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[:2]}
    assert lines == {
        "up_proj": ([0, 3, 6, 9], [5.0, 4.0, 3.0, 3.0]),
        "down_proj": ([0, 3, 6, 9], [6.0, 3.0, 3.0, 3.0]),
    }
    assert set(axes.lines[2].get_ydata()) == {4}, "the uniform rank that costs the same"
    assert axes.get_title() == "igu: from rank 6 to the cost of uniform rank 4"
