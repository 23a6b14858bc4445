"""Write docs/formulas.md, what each method computes, from the docstrings of the methods: run this file."""

import ast
import re
from pathlib import Path


PAGE = Path(__file__).with_name("formulas.md")
METHODS = PAGE.parents[1] / "llamafactory_adaptive" / "methods"
HEAD = """# Methods and their formulas

Made by `docs/make_formulas_page.py` from the head of each file in `llamafactory_adaptive/methods`; change it there.

For every `adaptive_method`: the paper, its equations, what differs here, and what it costs. Their keys are in
[options](options.md), when to take which in [how-to](how-to.md), what was measured in
[what was measured of the methods](methods.md).
"""
ORDER = ("sensitivity", "igu", "tsq", "adalora", "elalora", "svd")


def page() -> str:
    """Give the page's text: the methods that README puts first, then the others by name."""
    found = {path.stem: path for path in METHODS.glob("[!_]*.py")}
    names = [*ORDER, *sorted(found.keys() - set(ORDER))]
    return "\n".join([HEAD, *(_section(name, found[name]) for name in names)])


def _section(name: str, path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = re.sub(r":(?:func|meth|class):`~?([\w.]+)`", r"`\1`", doc).replace("``", "`")
    return f"## `{name}`\n\n{text}\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
