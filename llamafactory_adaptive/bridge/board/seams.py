"""The seams of LLaMA Board: applied together once its interface is imported, or not at all.

None of them is needed by a run: where one does not fit, the board is the host's own, and one line of the log says so.
"""

from collections.abc import Callable
from typing import Any

from llamafactory_adaptive.bridge.seam import Seam


INTERFACE = "llamafactory.webui.interface"
KIND = "adaptive"
WITHOUT = "LLaMA Board does not offer adaptive ranks"


def _seam(module: str, attribute: str, fits: Callable[[Any], bool], patch: Callable[[Any], Any]) -> Seam:
    return Seam(f"llamafactory.webui.{module}", attribute, fits, patch, True, INTERFACE, WITHOUT)


def _with_kind(kinds: Any) -> Any:
    return type(kinds)([*kinds, KIND])


def _knows_lora(kinds: Any) -> bool:
    return isinstance(kinds, (list, set)) and "lora" in kinds


_RUNNER_METHODS = ("_initialize", "_parse_train_args", "set_abort")


def _runner(original: Any) -> Any:
    from llamafactory_adaptive.bridge.board.runner import adaptive_runner

    return adaptive_runner(original)


def _locales(original: Any) -> Any:
    from llamafactory_adaptive.bridge.board.labels import locales

    return {**original, **locales()}


def _save_args(original: Any) -> Any:
    from llamafactory_adaptive.bridge.board.saved_settings import saving

    return saving(original)


def _load_args(original: Any) -> Any:
    from llamafactory_adaptive.bridge.board.saved_settings import loading

    return loading(original)


def _trainer_info(original: Any) -> Any:
    from llamafactory_adaptive.bridge.board.training_figure import with_ranks

    return with_ranks(original)


def _train_tab(original: Any) -> Any:
    from llamafactory_adaptive.bridge.board.interface import with_panel

    return with_panel(original)


def _footer(original: Any) -> Any:
    from llamafactory_adaptive.bridge.board.interface import with_ranks_tab

    return with_ranks_tab(original)


BOARD_SEAMS = (
    _seam("components.top", "METHODS", _knows_lora, _with_kind),
    *(
        _seam(module, "PEFT_METHODS", _knows_lora, _with_kind)
        for module in ("runner", "control", "chatter", "components.export")
    ),
    _seam("engine", "Runner", lambda cls: all(hasattr(cls, name) for name in _RUNNER_METHODS), _runner),
    _seam("engine", "LOCALES", lambda table: isinstance(table, dict) and "lora_rank" in table, _locales),
    _seam("runner", "save_args", callable, _save_args),
    _seam("runner", "load_args", callable, _load_args),
    _seam("runner", "get_trainer_info", callable, _trainer_info),
    _seam("interface", "create_train_tab", callable, _train_tab),
    _seam("interface", "create_footer", callable, _footer),
)
