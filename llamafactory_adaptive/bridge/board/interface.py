"""The board's tabs with the plugin's components in them, and what their events do."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from llamafactory_adaptive.bridge.board.labels import component_name
from llamafactory_adaptive.bridge.board.option_fields import PLAN_KEY
from llamafactory_adaptive.bridge.board.panel import Panel, build_panel, connect_visibility, place_before
from llamafactory_adaptive.bridge.board.plan_preview import Shown, use_edited
from llamafactory_adaptive.bridge.board.ranks_tab import build_ranks_tab
from llamafactory_adaptive.bridge.board.saved_settings import TAB


Elements = dict[str, Any]

# The host builds its footer without telling of which board: that whose Train tab was built last.
_engines: list[Any] = []


def with_panel(original: Callable[[Any], Elements]) -> Callable[[Any], Elements]:
    """Wrap the host's ``create_train_tab``: the panel is part of the tab, and its fields are among the inputs."""

    @wraps(original)
    def create_train_tab(engine: Any) -> Elements:
        _engines[:] = [engine]
        panel = build_panel()
        engine.manager.add_elems(TAB, panel.elements())
        theirs, inputs = _with_more_inputs(original, engine, set(panel.fields.values()))
        place_before(panel.parts["panel"], [theirs.get(name) for name in ("extra_tab", "freeze_tab", "lora_tab")])
        connect_visibility(panel, engine.manager.get_elem_by_id("top.finetuning_type"), theirs["lora_rank"])
        _connect_preview(panel, engine, inputs)
        return theirs

    return create_train_tab


def _with_more_inputs(original: Callable[[Any], Elements], engine: Any, more: set[Any]) -> tuple[Elements, set[Any]]:
    """Build the host's tab with more components among its inputs; return its components and all its inputs.

    The host adds its own inputs to the set of those that all tabs share.
    """
    inputs = engine.manager.get_base_elems() | more
    engine.manager.get_base_elems = lambda: inputs
    try:
        return original(engine), inputs
    finally:
        del engine.manager.get_base_elems


def _connect_preview(panel: Panel, engine: Any, inputs: set[Any]) -> None:
    names = ("status", "stop_btn", "picture", "edit_box", "rank_table", "plan_file", "plan_text")
    outputs = {**{name: panel.parts[name] for name in names}, "plan_path": panel.plan_path}

    def preview(data: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        for shown in engine.runner.preview_plan(data):
            yield {outputs[name]: value for name, value in shown.items()}

    def use(path: str, rows: Any, lang: str) -> dict[Any, Any]:
        shown: Shown
        shown, new = use_edited(path, rows, lang)
        updates = {outputs[name]: value for name, value in shown.items()}
        return {**updates, panel.fields[PLAN_KEY]: new} if new else updates

    panel.parts["preview_btn"].click(preview, inputs, list(outputs.values()))
    panel.parts["stop_btn"].click(engine.runner.command.abort, queue=False)
    if not engine.demo_mode:
        lang, table = engine.manager.get_elem_by_id("top.lang"), panel.parts["rank_table"]
        panel.parts["use_btn"].click(
            use, [panel.plan_path, table, lang], [*outputs.values(), panel.fields[PLAN_KEY]], queue=False
        )


def with_ranks_tab(original: Callable[[], Elements]) -> Callable[[], Elements]:
    """Wrap the host's ``create_footer``: a tab for the ranks of finished runs stands beside the host's tabs."""

    @wraps(original)
    def create_footer() -> Elements:
        if _engines:
            engine = _engines.pop()
            parts = build_ranks_tab(engine)
            engine.manager.add_elems(TAB, {component_name(name): part for name, part in parts.items()})
        return original()

    return create_footer
