"""The board's tabs with the plugin's components in them, and what their events do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from gradio.context import Context
from llamafactory.webui import runner as host_runner

from llamafactory_adaptive.bridge.board.labels import component_name
from llamafactory_adaptive.bridge.board.option_fields import PLAN_KEY
from llamafactory_adaptive.bridge.board.panel import Panel, build_panel, connect_visibility, place_before
from llamafactory_adaptive.bridge.board.plan_preview import Shown, use_edited
from llamafactory_adaptive.bridge.board.ranks_tab import build_ranks_tab
from llamafactory_adaptive.bridge.board.saved_settings import TAB
from llamafactory_adaptive.bridge.board.seams import KIND, WITHOUT
from llamafactory_adaptive.bridge.seam import log_loss


Elements = dict[str, Any]

# The host builds its footer without telling of which board: that whose Train tab was built last.
_engines: list[Any] = []


def with_panel(original: Callable[[Any], Elements]) -> Callable[[Any], Elements]:
    """Wrap the host's ``create_train_tab``: the panel is part of the tab, and its fields are among the inputs.

    A host whose tab is another than expected builds it alone.
    """

    @wraps(original)
    def create_train_tab(engine: Any) -> Elements:
        _engines.clear()
        try:
            with _taken_back_on_error():
                theirs = _tab_with_panel(original, engine)
        except Exception as error:  # whatever a host of another version makes of it
            log_loss(WITHOUT, f"its Train tab: {type(error).__name__}: {error}")
            _withdraw(engine)
            return original(engine)
        _engines.append(engine)
        return theirs

    return create_train_tab


def _tab_with_panel(original: Callable[[Any], Elements], engine: Any) -> Elements:
    panel = build_panel()
    theirs, inputs = _with_more_inputs(original, engine, set(panel.fields.values()))
    place_before(panel.parts["panel"], [theirs.get(name) for name in ("extra_tab", "freeze_tab", "lora_tab")])
    connect_visibility(panel, engine.manager.get_elem_by_id("top.finetuning_type"), theirs["lora_rank"])
    _connect_preview(panel, engine, inputs)
    engine.manager.add_elems(TAB, panel.elements())  # at the end: there is no way to take them back
    return theirs


@contextmanager
def _taken_back_on_error() -> Iterator[None]:
    """Remove from the page what was added to it within the context, components and events, where that fails."""
    page, block = Context.root_block, Context.block
    assert page is not None
    assert block is not None
    blocks, events, children = dict(page.blocks), dict(page.fns), list(block.children)
    try:
        yield
    except Exception:
        block.children[:] = children
        for held, before in ((page.blocks, blocks), (page.fns, events)):
            held.clear()
            held.update(before)
        raise


def _withdraw(engine: Any) -> None:
    """Remove the choice of adaptive ranks from a board that has no panel, and the panel's part of loaded files."""
    kind = engine.manager.get_elem_by_id("top.finetuning_type")
    kind.choices = [choice for choice in kind.choices if KIND not in choice]
    host_runner.load_args = getattr(host_runner.load_args, "__wrapped__", host_runner.load_args)


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

    def use(path: str, rows: Any, lang: str, rank: Any, unit: Any) -> dict[Any, Any]:
        shown: Shown
        shown, new = use_edited(path, rows, lang, rank, unit)
        updates = {outputs[name]: value for name, value in shown.items()}
        return {**updates, panel.fields[PLAN_KEY]: new} if new else updates

    panel.parts["preview_btn"].click(preview, inputs, list(outputs.values()))
    panel.parts["stop_btn"].click(engine.runner.command.abort, queue=False)
    if not engine.demo_mode:
        edited = [panel.plan_path, panel.parts["rank_table"], engine.manager.get_elem_by_id("top.lang")]
        budget = [panel.parts["budget"], panel.fields["adaptive_budget_unit"]]
        panel.parts["use_btn"].click(use, [*edited, *budget], [*outputs.values(), panel.fields[PLAN_KEY]], queue=False)


def with_ranks_tab(original: Callable[[], Elements]) -> Callable[[], Elements]:
    """Wrap the host's ``create_footer``: a tab for the ranks of finished runs stands beside the host's tabs."""

    @wraps(original)
    def create_footer() -> Elements:
        if _engines:
            try:
                with _taken_back_on_error():
                    _add_ranks_tab(_engines.pop())
            except Exception as error:  # whatever a host of another version makes of it
                log_loss("LLaMA Board shows no finished runs", f"its footer: {type(error).__name__}: {error}")
        return original()

    return create_footer


def _add_ranks_tab(engine: Any) -> None:
    parts = build_ranks_tab(engine)
    engine.manager.add_elems(TAB, {component_name(name): part for name, part in parts.items()})
