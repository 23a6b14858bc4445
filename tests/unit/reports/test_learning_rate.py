"""What a user is told of a learning rate, and the table of them in the documents."""

import re

import pytest

from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.ranks.first_update import slowdown_of_norms
from llamafactory_adaptive.ranks.plan import ModuleShape
from llamafactory_adaptive.reports.learning_rate import rate_warning, rate_words
from tests.helpers.processes import ROOT


def test_a_rate_is_told_as_that_of_plain_lora_with_the_same_first_update():
    assert rate_words(1e-4, 6.7) == (
        "learning_rate 0.0001 moves each component of Delta W at first as plain LoRA does at 1.5e-05; the first "
        "update of plain LoRA at 0.0001 takes learning_rate 0.00067"
    )
    assert rate_words(1e-4, 1.0) is None
    assert rate_words(0.0, 6.75) is None


@pytest.mark.parametrize(
    ("rate", "slowdown", "advised"),
    [
        (1e-4, 6.75, "0.0007"),
        (5e-5, 6.75, "0.0007"),
        (2e-4, 6.75, "0.0007"),
        (1e-4, 96.0, "0.001"),
        (9e-4, 96.0, "0.001"),
        (1e-4, 3.17, "0.0004"),
    ],
)
def test_a_rate_of_plain_lora_is_warned_of_and_the_one_advised_is_not(rate, slowdown, advised):
    said = rate_warning(rate, slowdown)
    assert said.startswith(
        f"learning_rate {rate:g} is low for this method: each component of Delta W moves at first {slowdown:.0f} times"
    )
    assert said.endswith(f"try learning_rate: {advised}")
    assert rate_warning(float(advised), slowdown) is None


@pytest.mark.parametrize(("rate", "slowdown"), [(1e-6, 3.16), (1e-6, 1.0), (0.0, 96.0), (1e-3, 96.0), (7e-4, 6.75)])
def test_no_warning_comes_where_the_start_is_about_loras_or_the_rate_is_high(rate, slowdown):
    assert rate_warning(rate, slowdown) is None


SHAPE = ModuleShape("m", 576, 8)
METHODS = {
    "`igu`": ("igu", {}, 1.0),
    "`igu` with `igu_variant: published`": ("igu", {"variant": "published"}, 1.0),
    "`adalora`": ("adalora", {}, 2.0),  # alpha over twice lora_rank
    "`adalora` with `adalora_scale: lora_rank`": ("adalora", {"scale": "lora_rank"}, 1.0),
    "`elalora`": ("elalora", {}, 1.0),
    "`tsq`": ("tsq", {}, 1.0),
}


def test_the_table_of_first_updates_in_the_documents_is_right():
    page = (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8")
    (head, *rows) = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in re.search(r"^\| method \| 576 .*?\n\n", page, re.MULTILINE | re.DOTALL)[0].strip().splitlines()
        if "---" not in line
    ]
    assert len(rows) == len(METHODS) + 3
    for name, *shown in rows:
        if name in METHODS:
            method, options, weakening = METHODS[name]
            start = make_method(method, options).initial_adapter
            figures = [start.slowdown([ModuleShape("m", int(width), 8)]) * weakening for width in head[1:]]
            assert [float(cell) for cell in shown] == [pytest.approx(figure, rel=0.03) for figure in figures], name
        elif "`adaptive_init: eva`" in name:
            figure = pytest.approx(slowdown_of_norms(0.0, 1.0, SHAPE), abs=0.005)
            assert [float(cell) for cell in shown] == [figure] * 4
        elif "`adaptive_init: gora`" in name:
            assert set(shown) == {"1 at most"}
        else:
            assert set(shown) == {"1"}
