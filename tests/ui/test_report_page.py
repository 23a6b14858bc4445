"""The page of ``report --html`` in a real browser: it fits a phone, needs nothing, what is dangerous stays text."""

import pytest

from llamafactory_adaptive import cli
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from tests.helpers.browser import HAS_BROWSER, opened_files
from tests.helpers.runs import NASTY, save_run, save_whole_run


pytestmark = [
    pytest.mark.ui,
    pytest.mark.skipif(not HAS_BROWSER, reason="needs chromium: apt-get install chromium"),
]
RANKS = (((2, 6), (4, 0)), ((3, 3), (3, 3)))
NAMES = ("<img src=x onerror=alert(3)>", "second")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [save_whole_run(folder / name, ranks=ranks) for name, ranks in zip(NAMES, RANKS, strict=True)]
    page = folder / "pages" / "report.html"
    assert cli.main(["report", *map(str, runs), "--html", str(page)]) == 0
    return page


@pytest.fixture(scope="module")
def open_file():
    with opened_files() as open_file:
        yield open_file


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_and_asks_for_nothing(open_file, path, width, scheme):
    page = open_file(path, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("body script, head script, img, iframe, object").count() == 0
    ink, ground = page.evaluate(
        "(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))"
    )
    assert (brightness(ink) > brightness(ground)) == (scheme == "dark")
    assert not page.faults


def brightness(colour):
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(",")))


def test_all_of_a_run_is_on_it_and_what_others_wrote_is_text(open_file, path):
    page = open_file(path)
    for closed in page.locator("details").all():
        closed.locator("summary").click()
    said = page.locator("body").inner_text()
    for words in (
        "What was asked", "What came out", "288 used, 96 left over", "observing gradients",
        "Mean rank over the steps", "Budget over the steps", "Losses", "Side by side", "Loss by method",
        "Certificate for vllm", "passed", "+12.50 points, 95 % interval -1.00 to +26.00, p 0.07", "gsm8k",
        "Training data", "exact duplicates", "peak of device memory: 1.00 GiB", "question 2", *NAMES,
    ):  # fmt: skip
        assert words in said, words
    assert said.count(NASTY) > 10
    assert not page.faults


def test_a_tap_on_a_cell_tells_its_figures(open_file, path):
    page = open_file(path, 390)
    cell = page.locator(".heat .cell[title^='layer 0, down_proj: rank 6']").first
    cell.click()
    told = cell.evaluate("cell => getComputedStyle(cell, '::after').content")
    assert told == '"layer 0, down_proj: rank 6, 25.00% of the score, 144 parameters"'
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_model_of_thirty_layers_and_seven_types_fits_a_phone_and_each_of_its_ranks_is_seen(open_file, tmp_path):
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    modules = tuple(
        ModulePlan(f"model.layers.{layer}.mlp.{kind}", 576, 1536, 1 + (7 * layer + number) % 128, 0.1, 1 / 210)
        for layer in range(30)
        for number, kind in enumerate(kinds)
    )
    run = save_run(tmp_path / "out", RankPlan("sensitivity", {}, "params", 64, 128.0, modules))
    target = tmp_path / "report.html"
    assert cli.main(["report", str(run), "--html", str(target)]) == 0
    page = open_file(target, 390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    cells = page.locator(".heat .cell")
    assert sorted(map(int, cells.all_inner_texts())) == sorted(module.rank for module in modules)
    places = cells.evaluate_all(
        "cells => cells.map(c => [c.getBoundingClientRect(), c.scrollWidth - c.clientWidth])"
        ".map(([box, more]) => [box.left, box.right, more])"
    )
    assert max(more for *_, more in places) <= 0, "a number is wider than its cell"
    assert all(0 <= left < right <= 390 for left, right, _ in places)
    assert not page.faults


def test_every_letter_of_the_heatmap_can_be_read(open_file, path):
    """Contrast of text on its cell, as WCAG counts it for large and bold letters."""
    for scheme in ("light", "dark"):
        page = open_file(path, 1280, scheme)
        assert min(page.locator(".heat .cell").evaluate_all(CONTRAST)) > 3.0, scheme


CONTRAST = """cells => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = colour => {
    canvas.fillStyle = "black"; canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = Array.from(canvas.getImageData(0, 0, 1, 1).data).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return cells.filter(cell => !cell.classList.contains("off")).map(cell => {
    const style = getComputedStyle(cell), pair = [light(style.color), light(style.backgroundColor)].sort();
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  });
}"""
