"""The export of a finished run, by the command that also certifies it."""

import os
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from llamafactory_adaptive.bridge.board.command import BusyError, Command, Progress
from llamafactory_adaptive.bridge.board.labels import message
from llamafactory_adaptive.bridge.board.plan_preview import Shown, failure
from llamafactory_adaptive.errors import OutputError
from llamafactory_adaptive.files import CERTIFICATE_FILE, read_mapping
from llamafactory_adaptive.reports.plaintext import markdown


def export(command: Command, run: Path, server: str, out: str, base: str, lang: str) -> Iterator[Shown]:
    """Run the export of a run in a process of its own, and yield what the tab shows meanwhile and in the end.

    Args:
        command: runs it.
        run: the folder of the run.
        server: the server that will read the export.
        out: the new folder.
        base: folder or hub name of the base model; empty for the one that the adapter names.
        lang: language of the board.
    """
    folder = Path(out.strip()).expanduser()
    adapter = str(run) if run.is_absolute() else os.path.join(os.curdir, run)  # no name is taken for an option
    words = ["export", adapter, f"--for={server}", f"--out={folder}"]
    words += [f"--base={base.strip()}"] if base.strip() else []
    try:
        for progress in command.run(words):
            if progress.code is None:
                waiting = message("exporting", lang, seconds=progress.seconds)
                yield {"export_status": waiting, "export_text": _text(progress.complained), **_abortable(True)}
            else:
                yield {**_outcome(progress, folder, lang), **_abortable(False)}
    except BusyError:
        yield {"export_status": message("busy", lang)}


def _outcome(progress: Progress, folder: Path, lang: str) -> Shown:
    if progress.code != 0 or progress.ended:
        said, nothing = _text(progress.complained), gr.JSON(visible=False)
        return {"export_status": failure(progress, lang), "export_text": said, "certificate": nothing}
    done = message("exported", lang, seconds=progress.seconds, folder=markdown(str(folder)))
    path = folder / CERTIFICATE_FILE
    try:
        document = read_mapping(path, str(path), error=OutputError)
    except OutputError:
        document = {}
    return {
        "export_status": done,
        "export_text": _text(progress.said),
        "certificate": gr.JSON(value=document, visible=bool(document)),
    }


def _abortable(running: bool) -> Shown:
    return {"export_stop_btn": gr.Button(visible=running)}


def _text(text: str) -> gr.Code:
    return gr.Code(value=text, visible=bool(text))
