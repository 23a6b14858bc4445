"""Plots of ranks: a heat-map, and their change over a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.files import replacing
from llamafactory_adaptive.ranks.module_names import module_type
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.plaintext import plot_label
from llamafactory_adaptive.reports.tables import rank_grid


if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEATMAP_FILE = "adaptive_ranks.png"
HISTORY_FILE = "adaptive_rank_history.png"
_WIDEST = 120.0  # inches; matplotlib refuses pictures of more than 65,536 dots


def save_heatmap(plan: RankPlan, path: Path) -> None:
    """Draw a heat-map of ranks by layer and module type, and write it as PNG."""
    layers, types, cells = rank_grid(plan)
    values = [[cells.get((layer, kind), float("nan")) for layer in layers] for kind in types]
    figure = new_figure(max(6.0, 1.5 + 0.3 * len(layers)), 1.4 + 0.42 * len(types))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    axes.set_yticks(range(len(types)), [plot_label(kind) for kind in types])
    step = max(1, len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")
    b = plan.budget()
    axes.set_title(
        f"{plot_label(plan.method)}: {b['used_parameters']:,} parameters, the cost of uniform rank {plan.lora_rank}",
        fontsize=10,
    )
    figure.colorbar(image, ax=axes, label="rank")
    save_figure(figure, path)


def save_history(
    start: RankPlan,
    first: Sequence[Sequence[bool]],
    history: Sequence[Mapping[str, Any]],
    last_step: int,
    path: Path,
) -> None:
    """Plot the mean rank per module type over optimizer steps, with the rank of the uniform LoRA as a line.

    Args:
        start: the plan of the live tensors.
        first: per active module, which components were in use at first.
        history: per allocation ``step``, ``budget_asked``, ``budget_used`` and ``ranks`` of the active modules.
        last_step: the step at which the run ended.
        path: PNG file to write.
    """
    kinds = [module_type(module.name) for module in start.active]
    steps = [0, *(entry["step"] for entry in history), last_step]
    begin = [sum(row) for row in first]
    rows = [begin, *(entry["ranks"] for entry in history)]
    rows.append(rows[-1])
    figure = new_figure(8.0, 3.6)
    axes = figure.add_subplot()
    for kind in dict.fromkeys(kinds):
        means = [
            sum(rank for rank, k in zip(ranks, kinds, strict=True) if k == kind) / kinds.count(kind) for ranks in rows
        ]
        axes.step(steps, means, where="post", label=plot_label(kind))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("mean rank")
    axes.set_ylim(bottom=0)
    axes.axhline(start.lora_rank, color="0.6", linestyle=":", linewidth=1)
    axes.set_title(f"{plot_label(start.method)}: from rank {max(begin)} to the cost of uniform rank {start.lora_rank}")
    axes.legend(ncols=2, fontsize=8)
    save_figure(figure, path)


def new_figure(width: float, height: float) -> "Figure":
    """Create a figure of that many inches, or of the largest size that is allowed."""
    from matplotlib.figure import Figure

    return Figure(figsize=(min(_WIDEST, width), min(_WIDEST, height)), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as a whole PNG or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
