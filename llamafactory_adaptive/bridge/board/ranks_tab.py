"""The tab for the ranks of finished runs: one run or two, its plan as a file, and its export for a server."""

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from llamafactory.webui.common import DEFAULT_CACHE_DIR

from llamafactory_adaptive.bridge.board.exporting import export
from llamafactory_adaptive.bridge.board.labels import english, message
from llamafactory_adaptive.bridge.board.run_folders import finished_runs, is_saved, is_unfinished
from llamafactory_adaptive.bridge.board.run_view import run_view
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.export.request import SERVERS
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.reports.plaintext import plain


_DOWNLOADS = "adaptive_downloads"


def build_ranks_tab(engine: Any) -> dict[str, Any]:
    """Create the tab in the block that is being built, and connect its events; return its components by name."""
    parts: dict[str, Any] = {}
    runs = finished_runs()
    with gr.Tab(english("ranks_tab"), elem_id="adaptive_ranks_tab") as parts["ranks_tab"]:
        with gr.Row():
            for name in ("run", "other_run"):
                parts[name] = gr.Dropdown(
                    choices=runs, value=None, label=english(name), scale=3, elem_id=f"adaptive_{name}",
                    allow_custom_value=not engine.demo_mode,
                )  # fmt: skip
            parts["refresh_btn"] = gr.Button(english("refresh_btn"), elem_id="adaptive_refresh_btn")
            parts["show_btn"] = gr.Button(english("show_btn"), variant="primary", elem_id="adaptive_show_btn")
        parts["view"] = gr.HTML(elem_id="adaptive_view")
        parts["run_file"] = gr.DownloadButton(english("run_file"), visible=False, elem_id="adaptive_run_file")
        if not engine.demo_mode:
            _build_export(parts)
    _connect(parts, engine)
    return parts


def _build_export(parts: dict[str, Any]) -> None:
    with gr.Accordion(english("export_box"), open=False, elem_id="adaptive_export_box") as parts["export_box"]:
        with gr.Row():
            servers = [(f"{name} ({what})", name) for name, what in SERVERS.items()]
            parts["server"] = gr.Dropdown(servers, value="vllm", label=english("server"), elem_id="adaptive_server")
            parts["out"] = gr.Textbox(label=english("out"), placeholder="served/my_run", elem_id="adaptive_out")
            parts["base"] = gr.Textbox(label=english("base"), elem_id="adaptive_base")
        with gr.Row():
            parts["export_btn"] = gr.Button(english("export_btn"), variant="primary", elem_id="adaptive_export_btn")
            parts["export_stop_btn"] = gr.Button(english("export_stop_btn"), variant="stop", visible=False)
        parts["export_status"] = gr.Markdown(elem_id="adaptive_export_status")
        parts["export_text"] = gr.Code(
            label=english("export_text"), language=None, interactive=False, visible=False, max_lines=20
        )
        parts["certificate"] = gr.JSON(label=english("certificate"), visible=False, elem_id="adaptive_certificate")


def _connect(parts: dict[str, Any], engine: Any) -> None:
    lang, run, other = engine.manager.get_elem_by_id("top.lang"), parts["run"], parts["other_run"]

    def show(language: str, chosen: str | None, beside: str | None) -> tuple[str, Any]:
        return _shown(chosen, beside, language, engine.demo_mode)

    def refresh() -> list[Any]:
        return [gr.Dropdown(choices=finished_runs())] * 2

    parts["show_btn"].click(show, [lang, run, other], [parts["view"], parts["run_file"]])
    for event in (parts["refresh_btn"].click, parts["ranks_tab"].select):
        event(refresh, outputs=[run, other], queue=False)
    if not engine.demo_mode:
        _connect_export(parts, engine, lang)


def _shown(chosen: str | None, beside: str | None, lang: str, demo: bool) -> tuple[str, Any]:
    """Return the view of a run, and its plan as a file; what is wrong where there is no such run."""
    hidden = gr.DownloadButton(visible=False)
    folders = [Path(name.strip()) for name in (chosen, beside) if name and name.strip()]
    if not (chosen and chosen.strip()):
        return _note(message("no_run", lang)), hidden
    if demo and not all(map(is_saved, folders)):
        return _note(message("outside", lang)), hidden
    if training := [folder for folder in folders if is_unfinished(folder)]:
        return _note(message("not_ended", lang, run=training[0])), hidden
    try:
        view = run_view(folders[0], folders[1] if len(folders) > 1 else None, lang)
    except PlanError as error:
        return _note(str(error)), hidden
    return view, _plan_file(folders[0])


def _plan_file(folder: Path) -> Any:
    """Return a plan as a file that the board may serve: one below its working folder, else a copy there."""
    path = (folder / PLAN_FILE).resolve()
    if not path.is_relative_to(Path.cwd()):  # where saves is a link, say
        plan = load_plan(path)
        path = Path(DEFAULT_CACHE_DIR) / _DOWNLOADS / plan.digest()[:12] / PLAN_FILE
        plan.write(path)
    return gr.DownloadButton(value=str(path), visible=True)


def _note(text: str) -> str:
    return f"<p>{escape(plain(text, 2000))}</p>"


def _connect_export(parts: dict[str, Any], engine: Any, lang: Any) -> None:
    names = ("export_status", "export_stop_btn", "export_text", "certificate")
    outputs = {name: parts[name] for name in names}

    def start(language: str, chosen: str | None, server: str, out: str, base: str) -> Iterator[dict[Any, Any]]:
        run = (chosen or "").strip()
        if not run or not out.strip():
            yield {outputs["export_status"]: message("no_folder" if run else "no_run", language)}
            return
        for shown in export(engine.runner.command, Path(run), server, out, base, language):
            yield {outputs[name]: value for name, value in shown.items()}

    inputs = [lang, parts["run"], parts["server"], parts["out"], parts["base"]]
    parts["export_btn"].click(start, inputs, list(outputs.values()))
    parts["export_stop_btn"].click(engine.runner.command.abort, queue=False)
