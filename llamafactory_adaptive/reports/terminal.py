"""Tables on a terminal, with ranks in shades of colour; where output is piped, they are the plain text of old."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.plaintext import plain
from llamafactory_adaptive.reports.tables import rank_grid, rank_table, totals, type_rows


if TYPE_CHECKING:
    from rich.console import Console, RenderableType


_SHADES = ("#16324f", "#1f4a78", "#2a639f", "#3a7fc4", "#5b9fdf", "#8cc0f0")  # of the background of a rank, upwards
_SHADING = ("256", "truecolor")  # systems that have these shades; the sixteen colours of others are too far apart
_DARK = 4  # shades below this take light digits


def on_terminal() -> bool:
    """Tell whether standard output is a terminal that shows colours and lines."""
    return sys.stdout.isatty()


def print_plan(plan: RankPlan) -> None:
    """Print the ranks of a plan, a summary by module type, and the totals against a uniform LoRA."""
    if not on_terminal():
        print(rank_table(plan))
        return
    title = f"Ranks ({plain(plan.method)}, {len(plan.modules)} modules)"
    console = _console()
    console.print(title, style="bold", markup=False)
    console.print(_grid(plan, shaded=console.color_system in _SHADING))
    console.print(_table(type_rows(plan)))
    for line in totals(plan):
        console.print(line, markup=False)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print rows as a table below its head; on a terminal only."""
    _console().print(_table(rows))


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def _grid(plan: RankPlan, shaded: bool) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    layers, types, cells = rank_grid(plan)
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
    table.add_column("layer", justify="right", style="dim")
    for kind in types:
        table.add_column(Text(plain(kind)), justify="right")
    for layer in layers:
        shown = [_cell(cells.get((layer, kind)), plan.largest_rank, shaded) for kind in types]
        table.add_row("-" if layer is None else str(layer), *shown)
    return table


def _cell(rank: float | None, largest: int, shaded: bool) -> "RenderableType":
    from rich.text import Text

    if not rank:
        return Text("" if rank is None else "0", style="dim")
    if not shaded:
        return Text(f"{rank:g}")
    shade = min(len(_SHADES) - 1, int(rank / largest * len(_SHADES)))
    return Text(f"{rank:g}".rjust(5), style=f"{'bright_white' if shade < _DARK else 'black'} on {_SHADES[shade]}")


def _table(rows: Sequence[Sequence[str]]) -> "RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    head, *body = rows
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for number, name in enumerate(head):
        table.add_column(Text(name), justify="right" if number else "left")
    for row in body:
        table.add_row(*map(Text, row))
    return table
