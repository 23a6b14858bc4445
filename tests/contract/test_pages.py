"""Pages that are made from the code are fresh."""

import importlib.util
from pathlib import Path


DOCS = Path(__file__).parents[2] / "docs"


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


def test_the_answer_of_readme_and_the_page_of_findings_are_what_was_recorded():
    maker = load("make_worth_it_page")
    text = maker.README.read_text(encoding="utf-8")
    assert maker.with_answer(text) == text, "run: make bench-report"
    assert text.count(maker.MARKS[0]) == text.count(maker.MARKS[1]) == 1
    written = maker.PAGE.read_text(encoding="utf-8") if maker.PAGE.is_file() else ""
    assert maker.page() == written, "run: make bench-report"
