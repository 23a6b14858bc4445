"""Pages that are made from the code are fresh."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamafactory_adaptive.methods._registry import built_in


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker


def test_the_tables_of_the_page_of_methods_are_what_was_recorded():
    text, maker = (DOCS / "methods.md").read_text(encoding="utf-8"), load("make_methods_page")
    assert maker.page(text) == text, "run: python docs/make_methods_page.py"
    for name, table in maker.TABLES.items():
        assert len(list(table())) > 3, f"{name} has no rows"
        assert f"<!-- {name} -->" in text


def test_the_page_of_options_is_what_the_options_say():
    maker = load("make_options_page")
    assert (DOCS / "options.md").read_text(encoding="utf-8") == maker.page(), "run: python docs/make_options_page.py"
    assert "`adaptive_max_nonfinite_steps`" in maker.page()
    assert "`tsq_temperature`" in maker.page()


@pytest.mark.parametrize("name", ["benchmarks", "formulas"])
def test_the_pages_of_figures_and_of_formulas_are_what_was_recorded_and_written(name):
    maker = load(f"make_{name}_page")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), f"run: python docs/make_{name}_page.py"


def test_every_method_has_its_formulas():
    headings = re.findall(r"^## `(\w+)`$", (DOCS / "formulas.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(built_in())


LINKED = [
    *("README.md", "README_zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "eval/README.md"),
    *("examples/README.md", "examples/inference/README.md"),
    *(f"docs/{path.name}" for path in DOCS.glob("*.md")),
]


@pytest.mark.parametrize("page", LINKED)
def test_links_of_a_page_lead_to_files_that_are_there(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s#]+)", text)
    assert [link for link in links if ":" not in link and not ((ROOT / page).parent / link).exists()] == []


def test_links_of_the_site_stay_within_it_and_other_files_are_named():
    pytest.importorskip("mkdocs")
    hooks = load("site_hooks")
    said = {
        "[a](docs/how-to.md#resume)": "[a](how-to.md#resume)",
        "[b](examples/README.md)": "[b](examples.md)",
        "![c](docs/images/ranks.png)": "![c](images/ranks.png)",
        "[d](examples/python)": "d (`examples/python`)",
        "[`examples/python`](examples/python)": "`examples/python`",
        "[e](https://a.b/c) [f](#g) [h](nowhere.md)": "[e](https://a.b/c) [f](#g) [h](nowhere.md)",
    }
    assert {text: hooks.rewritten(text, "README.md") for text in said} == said
    assert hooks.rewritten("[i](../eval/README.md#options)", "docs/evaluation.md") == "[i](harness.md#options)"
    page = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    with pytest.raises(hooks.PluginError, match=r"x.md fetches https://a.b/c.js"):
        hooks.on_post_page('<script src="https://a.b/c.js">', page, {})


def test_the_site_shows_the_picture_of_the_rooms_as_a_table_and_leaves_out_pages_that_are_not_there_yet(monkeypatch):
    pytest.importorskip("mkdocs")
    hooks = load("site_hooks")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="architecture.md"))
    shown = hooks.on_page_markdown((DOCS / "architecture.md").read_text(encoding="utf-8"), page, {}, [])
    assert "-->" not in shown
    assert "| `_bootstrap` | the start-up hook | `bridge` |" in shown
    monkeypatch.setattr(hooks, "OPTIONAL", {"nowhere.md"})
    nav = [{"A": "tutorial.md"}, {"B": [{"C": "nowhere.md"}, {"D": "how-to.md"}]}, {"E": "typo.md"}]
    assert hooks.on_config({"nav": nav})["nav"] == [nav[0], {"B": [{"D": "how-to.md"}]}, nav[2]]


def test_the_answer_of_readme_and_the_page_of_findings_are_what_was_recorded():
    maker = load("make_worth_it_page")
    text = maker.README.read_text(encoding="utf-8")
    assert maker.with_answer(text) == text, "run: make bench-report"
    regimes = [held["regime"] for held in maker.results().values()]
    assert regimes == sorted(regimes, key=list(maker.TITLES).index), "the primary regime first"
    assert text.count(maker.MARKS[0]) == text.count(maker.MARKS[1]) == 1
    written = maker.PAGE.read_text(encoding="utf-8") if maker.PAGE.is_file() else ""
    assert maker.page() == written, "run: make bench-report"
