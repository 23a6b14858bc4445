"""The board's runner of trainings, with the plugin's settings in them."""

import atexit
from collections.abc import Iterator
from typing import Any

import gradio as gr
from llamafactory.webui.locales import ALERTS

from llamafactory_adaptive.bridge.board.command import Command
from llamafactory_adaptive.bridge.board.labels import message
from llamafactory_adaptive.bridge.board.option_fields import changed_settings, option_fields
from llamafactory_adaptive.bridge.board.plan_preview import Shown, preview
from llamafactory_adaptive.bridge.board.saved_settings import elem_id
from llamafactory_adaptive.bridge.board.seams import KIND
from llamafactory_adaptive.errors import AdaptiveConfigError
from llamafactory_adaptive.reports.plaintext import markdown


Data = dict[Any, Any]  # what components hold
# Arguments that depend on the finetuning method: the host keeps adapters in a folder of its name.
_OF_THE_KIND = ("finetuning_type", "output_dir", "adapter_name_or_path")


def adaptive_runner(original: Any) -> Any:
    """Make a subclass of the host's runner that knows the plugin's fields."""

    class AdaptiveRunner(original):  # type: ignore[misc]
        """The host's runner; adaptive runs get the settings of the panel."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.command = Command()
            atexit.register(self.command.close)  # it runs in a session of its own, which Ctrl-C does not reach

        def _initialize(self, data: Data, do_train: bool, from_preview: bool) -> str:
            error: str = super()._initialize(data, do_train, from_preview)
            if error or not do_train or self._kind(data) != KIND:
                return error
            if self.command.busy and not from_preview:
                return message("busy", self._lang(data))
            try:
                self._settings(data)
            except AdaptiveConfigError as problems:
                return "\n\n".join(markdown(line) for line in str(problems).splitlines())
            return ""

        def _parse_train_args(self, data: Data) -> dict[str, Any]:
            """Build the arguments of a training; those of an adaptive one are LoRA's, and the panel's."""
            args: dict[str, Any] = super()._parse_train_args(data)
            if args["finetuning_type"] != KIND or self._kind(data) != KIND:
                return args
            lora = super()._parse_train_args({**data, self._elem("top.finetuning_type"): "lora"})
            own = {key: args[key] for key in _OF_THE_KIND if key in args}
            return {**lora, **own, **self._settings(data)}

        def preview_plan(self, data: Data) -> Iterator[Shown]:
            """Run the planning of the run that the fields describe, and yield what the panel shows."""
            lang, error = self._lang(data), self._initialize(data, do_train=True, from_preview=True)
            if not error and self.demo_mode:
                error = ALERTS["err_demo"][lang]
            if error:
                gr.Warning(error)
                yield {"status": error}
            else:
                yield from preview(self.command, self._parse_train_args(data), lang)

        def _settings(self, data: Data) -> dict[str, Any]:
            """Return the panel's settings that are not default, as the host writes them.

            Raises:
                AdaptiveConfigError: values are not allowed.
            """
            values = {field.key: data[self._elem(elem_id(field.key))] for field in option_fields()}
            # The host drops what is false: a word is kept, and means the same.
            return {key: "false" if value is False else value for key, value in changed_settings(values).items()}

        def _elem(self, name: str) -> Any:
            return self.manager.get_elem_by_id(name)

        def _kind(self, data: Data) -> Any:
            return data[self._elem("top.finetuning_type")]

        def _lang(self, data: Data) -> str:
            return str(data[self._elem("top.lang")])

    return AdaptiveRunner
