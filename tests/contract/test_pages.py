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
