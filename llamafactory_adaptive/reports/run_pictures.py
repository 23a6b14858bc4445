"""Figures of a run over its optimizer steps: losses, and the budget of a search."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.reports.rank_pictures import framed
from llamafactory_adaptive.reports.svg import COLOURS, GREY, in_two_forms
from llamafactory_adaptive.reports.values import number


if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float]]
_MOST_POINTS = 400  # of one line


def loss_picture(losses: Points, eval_losses: Points, salt: str) -> str | None:
    """Draw the losses over the optimizer steps; None where none was logged."""
    if not (losses or eval_losses):
        return None

    def draw(axes: "Axes") -> None:
        for points, label, colour in ((losses, "training loss", COLOURS[0]), (eval_losses, "evaluation", COLOURS[1])):
            if points:
                marker = "o" if len(points) < 12 else ""
                steps, values = zip(*_thinned(points), strict=True)
                axes.plot(steps, values, label=label, color=colour, linewidth=1.6, marker=marker, markersize=4)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("loss")

    return framed(in_two_forms(draw, f"losses {salt}"), style=False)


def budget_picture(log: Sequence[Mapping[str, Any]], budget: Mapping[str, Any], salt: str) -> str | None:
    """Draw what the ranks in use cost over the steps of a search; None where there was no search."""
    kind = "parameters" if budget["unit"] == "params" else "ranks"
    used, allowed = (_points(log, key) for key in ("budget_used", "budget_asked"))
    if len(used) < 2:
        return None

    from matplotlib.ticker import EngFormatter

    def draw(axes: "Axes") -> None:
        for points, label, colour, style in ((allowed, "allowed", GREY, "--"), (used, "used", COLOURS[0], "-")):
            axes.step(*zip(*points, strict=True), where="post", label=label, color=colour, linestyle=style)
        axes.axhline(budget[f"asked_{kind}"], color=COLOURS[1], linestyle=":", label="asked for")
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(kind)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter())

    return framed(in_two_forms(draw, f"budget {salt}"), style=False)


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = ((number(line.get("step")), number(line.get(key))) for line in log)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _thinned(points: Points) -> list[tuple[float, float]]:
    """Average runs of neighbouring points, so that a line has no more than it can show."""
    size = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
