"""The panel of the Train tab: a field per option, shown where the method reads it, and the preview of a plan."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from llamafactory_adaptive.bridge.board.labels import component_name, english, explanation_of, label_of
from llamafactory_adaptive.bridge.board.option_fields import METHOD_KEY, OptionField, keys_of, option_fields
from llamafactory_adaptive.bridge.board.seams import KIND
from llamafactory_adaptive.config.arguments import AdaptiveArguments
from llamafactory_adaptive.methods import methods


# Fields that every user needs; all others that hold for every method are behind "More options".
_FIRST = (METHOD_KEY, "adaptive_budget_unit", "adaptive_min_rank", "adaptive_max_rank")
COLUMNS = ("module", "rank", "share of score", "parameters")
_NARROWEST = 300  # pixels of a field


@dataclass(frozen=True)
class Panel:
    """The components of the panel.

    Attributes:
        fields: the component of every option, by key.
        groups: the box of each method's own options, by method.
        parts: all other components, by their names in :mod:`labels`.
        plan_path: the plan that was previewed last in this browser.
    """

    fields: dict[str, Any]
    groups: dict[str, Any]
    parts: dict[str, Any]
    plan_path: Any

    def elements(self) -> dict[str, Any]:
        """Return all components that have texts or values, by their names in the board."""
        return {**self.fields, **{component_name(name): part for name, part in self.parts.items()}}


def build_panel() -> Panel:
    """Create the components of the panel in the block that is being built; the panel is hidden at first."""
    fields: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    with gr.Accordion(english("panel"), open=True, visible=False, elem_id="adaptive_panel") as parts["panel"]:
        _build_first_row(fields, parts)
        with gr.Accordion(english("method_options"), open=False) as parts["method_options"]:
            groups = {name: _build_group(name, fields) for name in sorted(methods())}
        with gr.Accordion(english("more_options"), open=False) as parts["more_options"], gr.Row():
            fields |= {field.key: _component(field) for field in _common() if field.key not in _FIRST}
        _build_preview(parts)
        plan_path = gr.State("")
    return Panel(fields, groups, parts, plan_path)


def _common() -> list[OptionField]:
    return [field for field in option_fields() if not field.method]


def _build_first_row(fields: dict[str, Any], parts: dict[str, Any]) -> None:
    with gr.Row():
        for field in sorted((field for field in _common() if field.key in _FIRST), key=lambda f: _FIRST.index(f.key)):
            fields[field.key] = _component(field)
            if field.key == METHOD_KEY:
                parts["budget"] = gr.Slider(
                    1, 1024, 8, step=1, label=english("budget"), info="lora_rank", elem_id="adaptive_budget",
                    min_width=_NARROWEST,
                )  # fmt: skip


def _build_group(method: str, fields: dict[str, Any]) -> Any:
    with gr.Row(visible=method == AdaptiveArguments.adaptive_method) as group:
        fields |= {field.key: _component(field) for field in option_fields() if field.method == method}
    return group


def _component(field: OptionField) -> Any:
    """Create the component that fits an option's type."""
    common: dict[str, Any] = {
        "value": field.blank,
        "label": label_of(field),
        "info": explanation_of(field),
        "elem_id": field.key,
        "min_width": _NARROWEST,
        "visible": bool(field.method) or field.key in keys_of(AdaptiveArguments.adaptive_method),
    }
    if field.words:
        return gr.Dropdown(choices=[*([] if field.blank else [""]), *field.words], **common)
    if field.kind is bool:
        return gr.Checkbox(**common)
    # A number that is not set would be shown as 0.
    return gr.Textbox(**common) if field.kind is str or field.default is None else gr.Number(**common)


def _build_preview(parts: dict[str, Any]) -> None:
    with gr.Row():
        parts["preview_btn"] = gr.Button(english("preview_btn"), elem_id="adaptive_preview_btn")
        parts["stop_btn"] = gr.Button(english("stop_btn"), variant="stop", visible=False, elem_id="adaptive_stop_btn")
    parts["status"] = gr.Markdown(elem_id="adaptive_status")
    parts["picture"] = gr.HTML(elem_id="adaptive_picture")
    closed = {"open": False, "visible": False}
    with gr.Accordion(english("edit_box"), elem_id="adaptive_edit_box", **closed) as parts["edit_box"]:
        parts["rank_table"] = gr.Dataframe(
            headers=list(COLUMNS), datatype=["str", "number", "str", "str"], type="array", interactive=True,
            col_count=(len(COLUMNS), "fixed"), static_columns=[0, 2, 3], label=english("rank_table"),
            elem_id="adaptive_rank_table",
        )  # fmt: skip
        parts["use_btn"] = gr.Button(english("use_btn"), elem_id="adaptive_use_btn")
    parts["plan_file"] = gr.DownloadButton(english("plan_file"), visible=False, elem_id="adaptive_plan_file")
    parts["plan_text"] = gr.Code(
        label=english("plan_text"), language=None, interactive=False, visible=False, max_lines=30,
        elem_id="adaptive_plan_text",
    )  # fmt: skip


def connect_visibility(panel: Panel, kind: Any, rank: Any) -> None:
    """Bind what is shown to what is chosen: the panel, the options that the method reads, and one budget.

    Args:
        panel: the panel.
        kind: the host's choice of the finetuning method.
        rank: the host's slider of ``lora_rank``.
    """
    box, method, budget = panel.parts["panel"], panel.fields[METHOD_KEY], panel.parts["budget"]
    kind.change(lambda chosen: gr.Accordion(visible=chosen == KIND), [kind], [box], queue=False)
    depending = {field.key: panel.fields[field.key] for field in _common() if field.key != METHOD_KEY}
    shown = [*depending.values(), *panel.groups.values(), panel.parts["method_options"]]

    def show(chosen: str) -> list[Any]:
        read = keys_of(chosen)
        own = [field for field in option_fields() if field.method == chosen]
        return [
            *(component.__class__(visible=key in read) for key, component in depending.items()),
            *(gr.Row(visible=name == chosen) for name in panel.groups),
            gr.Accordion(visible=bool(own)),
        ]

    method.change(show, [method], shown, queue=False)
    budget.input(lambda value: value, [budget], [rank], queue=False)
    rank.change(lambda value: value, [rank], [budget], queue=False)


def place_before(box: Any, followers: Iterable[Any]) -> None:
    """Move a component of the block to the place before the first of others that are there; else leave it."""
    siblings = box.parent.children if box.parent is not None else []
    for follower in followers:
        if follower in siblings:
            siblings.remove(box)
            siblings.insert(siblings.index(follower), box)
            return
