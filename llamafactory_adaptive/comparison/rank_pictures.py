"""Pictures of the ranks that the arms of a comparison found: by module type, and by layer and module type."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.ranks.module_names import layer_and_type
from llamafactory_adaptive.reports.plaintext import plot_label
from llamafactory_adaptive.reports.plots import new_figure
from llamafactory_adaptive.reports.svg import to_svg


if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = Mapping[str, Any]
_COLUMNS = 2  # of pictures beside each other


def rank_picture(arms: Sequence[Entry]) -> str:
    """Draw the mean rank of each module type, one row for each arm."""
    kinds = list(dict.fromkeys(kind for arm in arms for kind in arm["mean_ranks"]))
    figure = new_figure(2.5 + 0.9 * len(kinds), 1.4 + 0.36 * len(arms))
    axes = figure.add_subplot()
    values = [[arm["mean_ranks"].get(kind, 0.0) for kind in kinds] for arm in arms]
    axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    largest = max(max(row) for row in values)
    for row, ranks in enumerate(values):
        for column, rank in enumerate(ranks):
            colour = "white" if rank < 0.6 * largest else "black"
            axes.text(column, row, f"{rank:.1f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(arms)), [plot_label(arm["name"]) for arm in arms])
    axes.set_xticks(range(len(kinds)), [plot_label(kind) for kind in kinds], rotation=30, ha="right")
    return to_svg(figure)


def layer_pictures(arms: Sequence[Entry]) -> str | None:
    """Draw the mean rank by layer and module type of each arm whose ranks are unequal; None where there is none.

    Modules that other arms adapt, and an arm does not, have rank 0 in it.
    """
    modules = dict.fromkeys((name for arm in arms for name in arm["ranks"]), 0.0)
    shown = {arm["name"]: ranks for arm in arms if len(set((ranks := modules | arm["ranks"]).values())) > 1}
    if not shown:
        return None
    cells = [rank_cells(ranks) for ranks in shown.values()]
    layers = sorted({layer for each in cells for layer, _ in each})
    kinds = list(dict.fromkeys(kind for each in cells for _, kind in each))
    rows, largest = -(-len(shown) // _COLUMNS), max(rank for each in cells for rank in each.values())
    figure = new_figure(3.0 + 0.13 * _COLUMNS * len(layers), rows * (0.9 + 0.24 * len(kinds)))
    for place, (name, each) in enumerate(zip(shown, cells, strict=True), 1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        values = [[each.get((layer, kind), math.nan) for layer in layers] for kind in kinds]
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=largest)
        axes.set_title(plot_label(name), fontsize=9)
        _label_cells(axes, layers, kinds)
    figure.colorbar(image, ax=figure.axes, label="mean rank over seeds")
    return to_svg(figure)


def rank_cells(ranks: Mapping[str, float]) -> dict[tuple[int, str], float]:
    """Compute the mean rank by layer and type; modules of no layer are in layer -1, and experts share a cell."""
    found: dict[tuple[int, str], list[float]] = {}
    for name, rank in ranks.items():
        layer, kind = layer_and_type(name)
        found.setdefault((-1 if layer is None else layer, kind), []).append(rank)
    return {cell: sum(values) / len(values) for cell, values in found.items()}


def _label_cells(axes: "Axes", layers: Sequence[int], kinds: Sequence[str]) -> None:
    step = max(1, len(layers) // 10)
    axes.set_xticks(range(0, len(layers), step), ["" if layer < 0 else str(layer) for layer in layers[::step]])
    axes.set_yticks(range(len(kinds)), [plot_label(kind) for kind in kinds])
    axes.tick_params(labelsize=7)
