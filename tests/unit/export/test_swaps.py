"""Entries of a source folder that change between the look at them and the copy."""

import os
from pathlib import Path

import pytest

from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.export import base_checkpoint, exporter, folder_links
from llamafactory_adaptive.export.folder_links import OutsideError, open_inside
from llamafactory_adaptive.export.request import ExportRequest
from tests.helpers.lora import save_adapter
from tests.helpers.tiny import save_tiny


def to_a_link(path: Path, secret: Path) -> None:
    path.unlink()
    path.symlink_to(secret)


def to_a_pipe(path: Path, secret: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_to_a_link(path: Path, secret: Path) -> None:
    path.parent.rename(path.parent.with_name("aside"))
    path.parent.symlink_to(secret.parent)


def removed(path: Path, secret: Path) -> None:
    path.unlink()


SWAPS = [
    (to_a_link, "has become a link while it was read"),
    (to_a_pipe, "is no ordinary file"),
    (folder_to_a_link, "has become a link while it was read"),
    (removed, "No such file"),
]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of this machine, called as the entry is."""
    path = tmp_path / "private" / "chat.jinja"
    path.parent.mkdir()
    path.write_text("PRIVATE KEY")
    return path


@pytest.mark.parametrize(("swap", "said"), SWAPS)
def test_what_is_opened_is_what_was_judged(swap, said, secret, tmp_path, monkeypatch):
    entry = tmp_path / "source" / "additional_chat_templates" / "chat.jinja"
    entry.parent.mkdir(parents=True)
    entry.write_text("as it was")
    name = "additional_chat_templates/chat.jinja"
    with open_inside(tmp_path / "source", name) as file:
        assert file.read() == b"as it was"
    judge = folder_links._target

    def judge_then_swap(folder, name):
        judged = judge(folder, name)
        swap(entry, secret)
        return judged

    monkeypatch.setattr(folder_links, "_target", judge_then_swap)
    with pytest.raises((OutsideError, FileNotFoundError), match=said):
        open_inside(tmp_path / "source", name)


def test_links_that_stay_inside_are_opened(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").symlink_to("a.json")
    with open_inside(tmp_path, "b.json") as file:
        assert file.read() == b"{}"


@pytest.mark.parametrize("swap", [to_a_link, to_a_pipe, removed])
@pytest.mark.parametrize("side", ["base", "adapter"])
def test_an_entry_swapped_after_the_look_at_its_folder_is_not_exported(side, swap, secret, tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter")
    for path in base.glob("tokenizer*"):
        (adapter / path.name).write_bytes(path.read_bytes())
    folder, name = {"base": (base, "config.json"), "adapter": (adapter, "tokenizer_config.json")}[side]
    look = base_checkpoint.entries_inside

    def look_then_swap(looked_at, *patterns):
        yield from look(looked_at, *patterns)
        if looked_at == folder:
            swap(folder / name, secret)

    monkeypatch.setattr(base_checkpoint, "entries_inside", look_then_swap)
    with pytest.raises(AdaptiveError, match=f"the files beside the weights cannot be copied: .*{name}"):
        exporter.run_export(ExportRequest(adapter, "merged", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))
