"""The figure of a run that trains: its loss, and on a second axis the mean rank of each type of module."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any

import gradio as gr
from llamafactory.extras.constants import TRAINER_LOG
from llamafactory.extras.ploting import gen_loss_plot

from llamafactory_adaptive.bridge.seam import log_loss
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE, read_lines
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.reports.plaintext import plot_label
from llamafactory_adaptive.reports.rank_history import RankHistory, rank_history, read_rank_history
from llamafactory_adaptive.reports.svg import type_colours


Info = tuple[str, Any, dict[str, Any]]
_DAMAGED = (PlanError, OSError, ValueError, KeyError, TypeError, IndexError)


def with_ranks(original: Callable[..., Info]) -> Callable[..., Info]:
    """Wrap the host's ``get_trainer_info``: the figure of an adaptive run shows ranks as well."""

    @wraps(original)
    def get_trainer_info(lang: str, output_path: str, do_train: bool) -> Info:
        log, progress, info = original(lang, output_path, do_train)
        history = ranks_so_far(Path(output_path)) if "loss_viewer" in info else None
        if history is not None:
            try:
                with suppress(*_DAMAGED):  # of a log that is being written, say; the host's figure is shown then
                    info["loss_viewer"] = gr.Plot(_figure(Path(output_path), history))
            except Exception as error:  # whatever a host of another version makes of it
                _log_once(f"the figure of a run: {type(error).__name__}: {error}")
        return log, progress, info

    return get_trainer_info


@cache  # a run is looked at every few seconds
def _log_once(fault: str) -> None:
    log_loss("LLaMA Board shows no ranks beside the loss", fault)


def ranks_so_far(folder: Path) -> RankHistory | None:
    """Read how ranks have changed so far, or those of a plan that does not change; None where no run is adaptive."""
    try:
        history = read_rank_history(folder)
        if history is None and (folder / PLAN_FILE).is_file():  # ranks that do not change
            plan = load_plan(folder / PLAN_FILE)
            history = rank_history(list(plan.ranks()), {0: list(plan.ranks().values())})
    except PlanError:
        return None
    return history


def _figure(folder: Path, history: RankHistory) -> Any:
    entries = [json.loads(line) for line in read_lines(folder / TRAINER_LOG)]
    figure = gen_loss_plot(entries)
    last = max([history.steps[-1], *(entry["current_steps"] for entry in entries)])
    figure.set_layout_engine("constrained")
    figure.set_size_inches(6.4, 6.0)
    axes = figure.axes[0].twinx()
    colours = type_colours(history.means)
    for kind, means in history.means.items():
        steps, ranks = [*history.steps, last], [*means, means[-1]]
        axes.step(steps, ranks, where="post", color=colours[kind], linestyle="--", label=plot_label(kind))
    axes.set_ylabel("mean rank (dashed)")
    axes.set_ylim(bottom=0)
    figure.axes[0].get_legend().remove()  # the board's picture is small: one legend, beside no line
    lines = [line for drawn in figure.axes for line in drawn.lines]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=11, frameon=False)
    return figure
