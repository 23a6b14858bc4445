"""Pictures of ranks as HTML that needs no script: heat-map, shares of the module types, ranks over the steps.

Every function returns an HTML element that brings its own style, for any page that is light or dark: a report, or a
panel of a web interface. All text in it is escaped.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.ranks.module_names import layer_and_type, module_type
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.reports.plaintext import plain, plot_label
from llamafactory_adaptive.reports.plots import new_figure
from llamafactory_adaptive.reports.rank_history import RankHistory
from llamafactory_adaptive.reports.svg import to_themed_svg


if TYPE_CHECKING:
    from jinja2 import Environment

_HIGH = 0.55  # above this part of the largest rank a cell is dark, and its number light
# Of middling lightness, so that each is seen on a light page and on a dark one.
_COLOURS = ("#2f81f7", "#d97706", "#2da44e", "#bf3989", "#8957e5", "#0d9488", "#e5534b", "#9a7b0a", "#768390")
_SIZES = {"wide": (8.8, 3.2), "narrow": (3.6, 3.0)}  # inches, at which letters have the size of the page's


def rank_heatmap(plan: RankPlan) -> str:
    """Build a heat-map of ranks by layer and module type; each cell tells its rank, share and parameters."""
    largest = max(1, plan.largest_rank)
    return _heatmap(_by_place(plan), lambda modules: _rank_cell(modules, largest), "Rank by layer and module type")


def difference_heatmap(plan: RankPlan, other: RankPlan) -> str:
    """Build a heat-map of the ranks of ``plan`` less those of ``other``, by layer and module type."""
    theirs = other.ranks()
    most = max(1.0, *(abs(module.rank - theirs.get(module.name, 0)) for module in plan.modules))
    label = "Difference in rank by layer and module type"
    return _heatmap(_by_place(plan), lambda modules: _difference_cell(modules, theirs, most), label)


def share_bars(plan: RankPlan) -> str:
    """Build bars of each module type's share of parameters and score, beside its share in a uniform LoRA."""
    by_type: dict[str, list[ModulePlan]] = {}
    for module in plan.modules:
        by_type.setdefault(module_type(module.name), []).append(module)
    used, uniform = (plan.budget()[key] for key in ("used_parameters", "asked_parameters"))
    scored = any(module.share > 0 for module in plan.modules)
    rows = [_share_row(kind, modules, used, uniform, plan.lora_rank) for kind, modules in by_type.items()]
    longest = max(max(row["share"], row["score"], row["uniform"]) for row in rows) or 1.0
    for row in rows:
        widths = {"width": row["share"], "score_width": row["score"], "tick": row["uniform"]}
        row.update({key: f"{100 * value / longest:.2f}" for key, value in widths.items()})
    return framed(_rendered("share_bars.html.j2", rows=rows, scored=scored))


def history_picture(history: RankHistory, uniform_rank: int, last_step: int | None = None) -> str:
    """Draw the mean rank of each module type over the optimizer steps, in a wide and in a narrow form.

    Args:
        history: mean ranks and their steps.
        uniform_rank: rank of the uniform LoRA of the same cost, drawn as a line.
        last_step: step at which the run ended, up to which the last ranks are drawn.
    """
    drawn = [
        f'<div class="{form}">{_history_svg(history, uniform_rank, last_step, form)}</div>' for form in _SIZES
    ]  # of which the style shows one
    return framed("".join(drawn))


def framed(content: str) -> str:
    """Wrap HTML in the element that has the style of these pictures."""
    return f'<div class="adaptive-ranks">{_rendered("rank_style.html.j2")}{content}</div>'


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
    return framed(_rendered("heatmap.html.j2", cells=cells, label=label, **names))


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


def _share_row(kind: str, modules: Sequence[ModulePlan], used: int, uniform: int, lora_rank: int) -> dict[str, Any]:
    parameters = sum(module.parameters for module in modules)
    row = {
        "share": parameters / used,
        "score": sum(module.share for module in modules),
        "uniform": lora_rank * sum(module.parameters_per_rank for module in modules) / uniform,
    }
    mean = f"mean rank {_mean_rank(modules):.1f}"
    about = (
        f"{plain(kind)}: {len(modules)} modules, {mean}, {parameters:,} parameters, {row['share']:.1%} of all; "
        f"{row['uniform']:.1%} in a uniform LoRA; {row['score']:.1%} of the score"
    )
    return {**row, "type": plain(kind), "about": about, "figures": f"{row['share']:.1%}, {mean}"}


# -- drawing ----------------------------------------------------------------------------------------------------------


def _history_svg(history: RankHistory, uniform_rank: int, last_step: int | None, form: str) -> str:
    figure = new_figure(*_SIZES[form])
    axes = figure.add_subplot()
    steps = [*history.steps, max(last_step or 0, history.steps[-1])]
    for number, (kind, means) in enumerate(history.means.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        axes.step(steps, [*means, means[-1]], where="post", label=plot_label(kind), color=colour, linewidth=1.8)
    axes.axhline(uniform_rank, color="#768390", linestyle=":", linewidth=1.2, label=f"uniform LoRA ({uniform_rank})")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean rank")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    columns = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if form == "wide" else {
        "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}  # fmt: skip
    axes.legend(frameon=False, fontsize=9, **columns)
    return to_themed_svg(figure, f"history {form}")


def _rendered(template: str, **values: Any) -> str:
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("llamafactory_adaptive.reports", "templates")
    return Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
