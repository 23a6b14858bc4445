"""The figures of worth_it.py once more, from the ledgers that are shipped; then the pages that quote them.

Run: ``python benchmarks/report.py``. It fails where a recorded figure is not what the ledger gives. Otherwise it draws
the plots, writes docs/worth-it.md and README's answer, and prints the tables.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import shipped

from llamafactory_adaptive.comparison.pages import sentences, text_table
from llamafactory_adaptive.comparison.plots import figures
from llamafactory_adaptive.comparison.task_pages import task_text


DOCS = Path(__file__).parents[1] / "docs"


def page_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_worth_it_page", DOCS / "make_worth_it_page.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker


def checked(name: str) -> shipped.Held:
    """Make the figures of a result anew, and return them if they are those that were recorded."""
    held, lines = shipped.read(name)
    fresh = shipped.recomputed(held, lines)
    if differences := shipped.different(shipped.without_ranks(fresh), held["comparison"]):
        raise SystemExit(f"{name}: the ledger gives other figures: {'; '.join(differences[:10])}")
    return fresh


def main() -> None:
    maker = page_maker()
    fresh = {name: checked(name) for name in maker.results()}
    if not fresh:
        raise SystemExit("no comparison is recorded in benchmarks/results; make worth-it makes one")
    for name, made in fresh.items():
        drawn = figures(made)
        for plot, title in maker.PLOTS.items():
            if title in drawn:
                maker.image(name, plot).write_text(drawn[title], encoding="utf-8")
        print("\n".join([name, "", *text_table(made), "", *sentences(made), *task_text(made), ""]))
    maker.write()
    print(f"{len(fresh)} recorded comparisons agree with their ledgers")


if __name__ == "__main__":
    main()
