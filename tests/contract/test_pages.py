"""Pages that are made from the code are fresh."""

import importlib.util
from pathlib import Path


DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_options_is_what_the_options_say():
    spec = importlib.util.spec_from_file_location("make_options_page", DOCS / "make_options_page.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (DOCS / "options.md").read_text(encoding="utf-8") == maker.page(), "run: python docs/make_options_page.py"
    assert "`adaptive_max_nonfinite_steps`" in maker.page()
    assert "`tsq_temperature`" in maker.page()
