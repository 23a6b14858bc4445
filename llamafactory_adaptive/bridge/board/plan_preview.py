"""The preview of a plan: the command that plans, its progress, the plan's pictures, and ranks that a person edits."""

import dataclasses
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from llamafactory.webui.common import DEFAULT_CACHE_DIR, save_cmd

from llamafactory_adaptive.bridge.board.command import LONGEST_HOURS, BusyError, Command, Progress
from llamafactory_adaptive.bridge.board.labels import message
from llamafactory_adaptive.bridge.board.run_view import plan_view, spent
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan, load_plan, sufficient_rank
from llamafactory_adaptive.reports.plaintext import markdown


_MOST_ROWS = 2000  # of a table in a browser
_PREVIEWS, _EDITED = "adaptive_preview", "adaptive_plans"
_BOARD = uuid.uuid4().hex[:12]  # several boards may share a working folder

Shown = dict[str, Any]  # what components show, by their names in the panel


def preview(command: Command, args: Mapping[str, Any], lang: str) -> Iterator[Shown]:
    """Run the planning of ranks in a process of its own, and yield what the panel shows meanwhile and in the end.

    Args:
        command: runs it.
        args: the settings of the run.
        lang: language of the board.
    """
    if command.busy:
        yield {"status": message("busy", lang)}
        return
    folder = Path(DEFAULT_CACHE_DIR) / _PREVIEWS / _BOARD / uuid.uuid4().hex[:12]
    config = save_cmd({**args, "output_dir": str(folder)})
    yield {"status": message("planning", lang, seconds=0), **_nothing(), "plan_text": _text("")}
    try:
        for progress in command.run(["plan", config]):
            if progress.code is None:
                waiting = message("planning", lang, seconds=progress.seconds)
                yield {"status": waiting, "plan_text": _text(progress.complained), **_abortable(True)}
            else:  # no other preview of this board can be running
                _remove_all_but(folder)
                yield {**_outcome(progress, folder / PLAN_FILE, lang), **_abortable(False)}
    except BusyError:
        shutil.rmtree(folder, ignore_errors=True)
        yield {"status": message("busy", lang)}


def _remove_all_but(folder: Path) -> None:
    """Remove the folders of this board's earlier previews; those of other boards that run here are theirs."""
    for earlier in folder.parent.glob("*"):
        if earlier != folder:
            shutil.rmtree(earlier, ignore_errors=True)


def _outcome(progress: Progress, path: Path, lang: str) -> Shown:
    """Return what the panel shows once the command has ended."""
    if progress.code != 0 or progress.ended:
        return {"status": failure(progress, lang), **_nothing(), "plan_text": _text(progress.complained)}
    said = _text(progress.said)
    if not path.is_file():  # a method that finds ranks while it trains
        return {"status": message("found_later", lang), **_nothing(), "plan_text": said}
    plan = load_plan(path)
    status = message("planned", lang, seconds=progress.seconds, **spent(plan, lang))
    if len(plan.modules) > _MOST_ROWS:
        status += " " + message("too_many_rows", lang, modules=f"{len(plan.modules):,}", most=f"{_MOST_ROWS:,}")
    return {"status": status, **_shown(plan, path, lang), "plan_text": said, "plan_path": str(path)}


def failure(progress: Progress, lang: str) -> str:
    """Describe how a command that did not do its work ended."""
    if progress.ended:
        return message(progress.ended, lang, hours=LONGEST_HOURS)
    return message("failed", lang, code=progress.code)


def _abortable(running: bool) -> Shown:
    return {"stop_btn": gr.Button(visible=running)}


def _nothing() -> Shown:
    hidden = {"edit_box": gr.Accordion(visible=False), "plan_file": gr.DownloadButton(visible=False)}
    return {"picture": "", "plan_path": "", **hidden}


def _text(text: str) -> Any:
    return gr.Code(value=text, visible=bool(text))


def _shown(plan: RankPlan, path: Path, lang: str) -> Shown:
    rows = [[m.name, m.rank, f"{m.share:.2%}", f"{m.parameters:,}"] for m in plan.modules]
    return {
        "picture": plan_view(plan, lang),
        "edit_box": gr.Accordion(visible=len(rows) <= _MOST_ROWS),
        "rank_table": rows[:_MOST_ROWS],
        "plan_file": gr.DownloadButton(value=str(path), visible=True),
    }


def use_edited(
    path: str, rows: Sequence[Sequence[Any]], lang: str, lora_rank: int | None = None, unit: str | None = None
) -> tuple[Shown, str]:
    """Write a plan with edited ranks, for ``adaptive_plan``.

    Args:
        path: the plan that was previewed.
        rows: the rows of the table: a module's name and its rank, and what is not read.
        lang: language of the board.
        lora_rank: the budget that the panel holds by now, which a training counts with; None for the plan's.
        unit: what that budget counts; None for the plan's.

    Returns:
        What the panel shows, and the path of the new plan; empty where a training would refuse its ranks.
    """
    try:
        plan = load_plan(Path(path)) if path else None
    except PlanError:  # another preview has replaced it
        plan = None
    if plan is None:
        return {"status": message("no_plan", lang)}, ""
    typed: dict[str, Any] = {str(row[0]): row[1] for row in rows}
    modules = []
    for module in plan.modules:
        rank = _rank(typed.get(module.name, module.rank), module)
        if rank is None:
            named = {"module": markdown(module.name), "largest": module.largest_rank}
            return {"status": message("wrong_rank", lang, **named)}, ""
        modules.append(dataclasses.replace(module, rank=rank))
    lora_rank, unit = lora_rank or plan.lora_rank, unit or plan.budget_unit
    new = dataclasses.replace(plan, modules=tuple(modules), lora_rank=lora_rank, budget_unit=unit)
    if (left := new.budget()[f"left_{new.budget_kind}"]) < 0:
        facts = {**spent(new, lang), "excess": f"{-left:,}", "rank": sufficient_rank(new)}
        return {"status": message("overspent", lang, **facts)}, ""
    target = Path(DEFAULT_CACHE_DIR) / _EDITED / f"plan-{new.digest()[:12]}.json"
    new.write(target)
    return {"status": message("edited", lang, **spent(new, lang)), **_shown(new, target, lang)}, str(target)


def _rank(value: Any, module: ModulePlan) -> int | None:
    """Convert what a person typed to a rank of a module; None where it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() and 0 <= number <= module.largest_rank else None
