"""Plots of a comparison, as SVG for its page: differences, learning rates, costs; pictures of ranks are with them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_adaptive.comparison.arms import PLAIN
from llamafactory_adaptive.comparison.rank_pictures import layer_pictures, rank_picture
from llamafactory_adaptive.reports.plaintext import plot_label
from llamafactory_adaptive.reports.plots import new_figure
from llamafactory_adaptive.reports.svg import to_svg


Entry = Mapping[str, Any]
_COLOURS = {"better": "#1a7f37", "worse": "#b42318", "equivalent": "#1f6feb", "not decided": "#6e7781"}
_SHOWN = 0.15  # of the lowest loss, the range above it that a plot over rates shows
_MARGIN = 0.15  # of that range, the room below the lowest loss
_FAR_WIDER = 4.0  # times the median of how far intervals reach, from which on one is cut off
_LEVEL_LABELS = 8  # more labels of rates than these do not fit side by side


def figures(document: Mapping[str, Any]) -> dict[str, str]:
    """Draw all plots that the document has figures for: title to SVG."""
    arms = document["arms"]
    judged = [arm for arm in arms if "loss" in arm]
    compared = [arm for arm in judged if (arm["verdicts"].get(PLAIN) or {}).get("difference")]
    drawn = {
        "Difference to plain LoRA": forest_plot(compared, document["smallest_effect"]) if compared else None,
        "Loss over the learning rate": rate_curves([arm for arm in arms if "curve" in arm]),
        "Loss over parameters and time": cost_plot(judged) if judged else None,
        "Mean rank by module type": rank_picture(judged) if judged else None,
        "Mean rank by layer and module type": layer_pictures(judged),
    }
    return {title: svg for title, svg in drawn.items() if svg is not None}


def forest_plot(arms: Sequence[Entry], effect: float) -> str:
    """Draw each arm's relative difference to plain LoRA with its 95 % interval, and the band that does not matter.

    An interval that is far wider than most is cut off, and this is said: it would press all others into one point.
    """
    reaches = [100 * max(map(abs, _relative(arm).values())) for arm in arms]
    edge = _FAR_WIDER * statistics.median(reaches)
    figure = new_figure(7.5, 1.2 + 0.36 * len(arms))
    axes = figure.add_subplot()
    axes.axvspan(-100 * effect, 100 * effect, color="#1f6feb", alpha=0.10, linewidth=0)
    axes.axvline(0.0, color="0.5", linewidth=1)
    for row, arm in enumerate(arms):
        relative = {key: 100 * value for key, value in _relative(arm).items()}
        colour = _COLOURS.get(arm["verdicts"][PLAIN]["verdict"], "0.4")
        axes.plot([relative["low"], relative["high"]], [row, row], color=colour, linewidth=2)
        axes.plot([relative["value"]], [row], "o", color=colour)
        for beyond, end, marker in (
            (relative["low"] < -edge, -edge, "<"),
            (relative["high"] > edge, edge, ">"),
        ):
            if beyond:
                axes.plot([end], [row], marker, color=colour, clip_on=False)
    axes.set_yticks(range(len(arms)), [plot_label(arm["name"]) for arm in arms])
    axes.invert_yaxis()
    said = "held-out loss against plain LoRA in %, 95 % interval (left: better)"
    if max(reaches) > edge:
        axes.set_xlim(-edge, edge)
        said += "; arrows go on beyond the edge"
    axes.set_xlabel(said)
    return to_svg(figure)


def _relative(arm: Entry) -> Mapping[str, float]:
    found: Mapping[str, float] = arm["verdicts"][PLAIN]["difference"]["relative"]
    return found


def rate_curves(arms: Sequence[Entry]) -> str:
    """Draw the loss on the rows that choose over the learning rate, one line for each arm and alpha.

    What is far above the lowest loss is cut off, and this is said: it would press all that matters into one line.
    """
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    for arm in arms:
        for alpha in dict.fromkeys(point["alpha"] for point in arm["curve"]):
            points = [point for point in _measured(arm) if point["alpha"] == alpha]
            label = arm["name"] if alpha is None else f"{arm['name']}, alpha {alpha:g}"
            rates, losses = [point["rate"] for point in points], [point["dev_loss"] for point in points]
            axes.plot(rates, losses, marker="o", markersize=4, label=plot_label(label))
    if left_out := [point for arm in arms for point in _left_out(arm)]:
        axes.plot([point["rate"] for point in left_out], [point["dev_loss"] for point in left_out], "x", color="black",
                  markersize=9, label="left out: diverged with another seed")  # fmt: skip
    tried = sorted({point["rate"] for arm in arms for point in arm["curve"]})
    axes.set_xscale("log")
    axes.set_xticks(tried, [f"{rate:g}" for rate in tried], rotation=45 if len(tried) > _LEVEL_LABELS else 0)
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss on the rows that choose")
    lowest, top, highest = _reach(arms)
    if highest > top:
        axes.set_ylim(lowest - _MARGIN * (top - lowest), top)
        axes.set_ylabel(f"loss on the rows that choose\n(above {top:.3g} not shown)")
    axes.legend(fontsize=8, ncols=2)
    return to_svg(figure)


def _measured(arm: Entry) -> list[Entry]:
    return [point for point in arm["curve"] if point["dev_loss"] is not None]


def _left_out(arm: Entry) -> list[Entry]:
    """List the points of a curve at which a run that judges diverged."""
    unstable = [(point["rate"], point["alpha"]) for point in arm.get("unstable", ())]
    return [point for point in _measured(arm) if (point["rate"], point["alpha"]) in unstable]


def _reach(arms: Sequence[Entry]) -> tuple[float, float, float]:
    """Return the lowest loss of all curves, the loss up to which they are shown, and the highest."""
    curves = [[point["dev_loss"] for point in _measured(arm)] for arm in arms]
    best = [min(losses) for losses in curves if losses] or [0.0]
    lowest = min(best)
    top = max(lowest + _SHOWN * abs(lowest), 1.01 * max(best))  # so that each arm's best is seen
    return lowest, top, max((max(losses) for losses in curves if losses), default=0.0)


def cost_plot(arms: Sequence[Entry]) -> str:
    """Draw the held-out loss over the parameters of the saved adapter, and over the seconds of a run."""
    figure = new_figure(9.0, 3.6)
    for place, key, label in ((121, "parameters", "parameters that are saved"), (122, "seconds", "seconds of a run")):
        axes = figure.add_subplot(place)
        for arm in arms:
            axes.plot([arm[key]], [arm["loss"]], "o")
            axes.annotate(plot_label(arm["name"]), (arm[key], arm["loss"]), fontsize=8, xytext=(4, 3),
                          textcoords="offset points")  # fmt: skip
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss")
        axes.margins(0.2)
    return to_svg(figure)
