"""Pictures of ranks as HTML that needs no script: heat-map, shares of the module types, ranks over the steps.

Every function returns an HTML element for any page that is light or dark: a report, or a panel of a web interface. It
brings its own style, which a page with many of them needs once. All text in it is escaped.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.ranks.module_names import layer_and_type, module_type
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.reports.html import rendered
from llamafactory_adaptive.reports.plaintext import plain, plot_label
from llamafactory_adaptive.reports.rank_history import RankHistory
from llamafactory_adaptive.reports.svg import GREY, in_two_forms, type_colours
from llamafactory_adaptive.reports.tables import ranks_by_type


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HIGH = 0.55  # above this part of the largest rank a cell is dark, and its number light


def rank_heatmap(plan: RankPlan, style: bool = True) -> str:
    """Build a heat-map of ranks by layer and module type; each cell tells its rank, share and parameters."""
    largest, label = max(1, plan.largest_rank), "Rank by layer and module type"
    return framed(_heatmap(_by_place(plan), lambda modules: _rank_cell(modules, largest), label), style)


def difference_heatmap(plan: RankPlan, other: RankPlan, style: bool = True) -> str:
    """Build a heat-map of the ranks of ``plan`` less those of ``other``, by layer and module type."""
    theirs = other.ranks()
    most = max(1.0, *(abs(module.rank - theirs.get(module.name, 0)) for module in plan.modules))
    label = "Difference in rank by layer and module type"
    return framed(_heatmap(_by_place(plan), lambda modules: _difference_cell(modules, theirs, most), label), style)


def share_bars(plan: RankPlan, style: bool = True) -> str:
    """Build bars of each module type's share of parameters and score, beside its share in a uniform LoRA."""
    scored = any(module.share > 0 for module in plan.modules)
    rows = [_share_row(entry, plan) for entry in ranks_by_type(plan)]
    longest = max(max(row["share"], row["score"], row["uniform"]) for row in rows) or 1.0
    for row in rows:
        widths = {"width": row["share"], "score_width": row["score"], "tick": row["uniform"]}
        row.update({key: f"{100 * value / longest:.2f}" for key, value in widths.items()})
    return framed(rendered("share_bars.html.j2", rows=rows, scored=scored), style)


def history_picture(history: RankHistory, uniform_rank: int, last_step: int | None = None, style: bool = True) -> str:
    """Draw the mean rank of each module type over the optimizer steps, in a wide and in a narrow form.

    Args:
        history: mean ranks and their steps.
        uniform_rank: rank of the uniform LoRA of the same cost, drawn as a line.
        last_step: step at which the run ended, up to which the last ranks are drawn.
        style: whether the element brings its style; a page needs it once.
    """
    steps = [*history.steps, max(last_step or 0, history.steps[-1])]

    def draw(axes: "Axes") -> None:
        colours = type_colours(history.means)
        for kind, means in history.means.items():
            look = {"label": plot_label(kind), "color": colours[kind], "linewidth": 1.8}
            axes.step(steps, [*means, means[-1]], where="post", **look)
        axes.axhline(uniform_rank, color=GREY, linestyle=":", linewidth=1.2, label=f"uniform LoRA ({uniform_rank})")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("mean rank")
        axes.set_ylim(bottom=0)

    return framed(in_two_forms(draw, "history"), style)


def framed(content: str, style: bool = True) -> str:
    """Wrap HTML in the element that pictures are in; ``style`` tells whether it brings their style."""
    return f'<div class="adaptive-ranks">{rendered("rank_style.html.j2") if style else ""}{content}</div>'


# -- cells and rows ---------------------------------------------------------------------------------------------------


def _by_place(plan: RankPlan) -> dict[tuple[int | None, str], list[ModulePlan]]:
    """Group modules by layer and type; experts of one layer share a place."""
    places: dict[tuple[int | None, str], list[ModulePlan]] = {}
    for module in plan.modules:
        places.setdefault(layer_and_type(module.name), []).append(module)
    return places


def _heatmap(
    places: Mapping[tuple[int | None, str], Sequence[ModulePlan]],
    cell_of: Callable[[Sequence[ModulePlan]], dict[str, Any]],
    label: str,
) -> str:
    layers = list(dict.fromkeys(layer for layer, _ in places))
    types = list(dict.fromkeys(kind for _, kind in places))
    cells = []
    for (layer, kind), modules in places.items():
        cell = cell_of(modules)
        where = plain(kind) if layer is None else f"layer {layer}, {plain(kind)}"
        place = {"layer": layers.index(layer), "type": types.index(kind)}
        cells.append({**cell, **place, "about": f"{where}: {cell['about']}"})
    names = {"layers": ["-" if layer is None else layer for layer in layers], "types": [plain(k) for k in types]}
    return rendered("heatmap.html.j2", cells=cells, label=label, **names)


def _rank_cell(modules: Sequence[ModulePlan], largest: int) -> dict[str, Any]:
    rank, part = _mean_rank(modules), _mean_rank(modules) / largest
    share, parameters = (sum(getattr(module, key) for module in modules) for key in ("share", "parameters"))
    about = f"rank {_number(rank)}" if len(modules) == 1 else f"mean rank {_number(rank)} of {len(modules)} modules"
    about += f", {share:.2%} of the score" if share else ""
    look = " off" if rank == 0 else " high" if part > _HIGH else ""
    about += f", {parameters:,} parameters" if rank else ": no adapter"
    return {"text": _number(rank), "about": about, "look": look, "strength": f"{100 * part:.0f}"}


def _difference_cell(modules: Sequence[ModulePlan], theirs: Mapping[str, int], most: float) -> dict[str, Any]:
    here = _mean_rank(modules)
    there = sum(theirs.get(module.name, 0) for module in modules) / len(modules)
    part = abs(here - there) / most
    look = (" less" if here < there else "") + (" high" if part > _HIGH else "")
    text = "0" if here == there else f"{'+' if here > there else '-'}{_number(abs(here - there))}"
    about = f"rank {_number(here)} here, {_number(there)} there"
    return {"text": text, "about": about, "look": look, "strength": f"{100 * part:.0f}"}


def _mean_rank(modules: Sequence[ModulePlan]) -> float:
    return sum(module.rank for module in modules) / len(modules)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _share_row(entry: Mapping[str, Any], plan: RankPlan) -> dict[str, Any]:
    budget, kind = plan.budget(), plain(entry["type"])
    per_rank = sum(m.parameters_per_rank for m in plan.modules if module_type(m.name) == entry["type"])
    row = {
        "share": entry["parameters"] / budget["used_parameters"],
        "score": entry["share_of_score"],
        "uniform": plan.lora_rank * per_rank / budget["asked_parameters"],
    }
    mean = f"mean rank {entry['mean_rank']:.1f}"
    about = (
        f"{kind}: {entry['modules']} modules, {mean}, {entry['parameters']:,} parameters, {row['share']:.1%} of all; "
        f"{row['uniform']:.1%} in a uniform LoRA; {row['score']:.1%} of the score"
    )
    return {**row, "type": kind, "about": about, "figures": f"{row['share']:.1%}, {mean}"}
