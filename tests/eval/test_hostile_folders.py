"""Links, pipes and devices in place of a run's files: none is written through, none is waited for."""

import os

import pytest

from eval import compare, samples_page
from eval.cache import ANSWERS_FILE, AnswerCache
from eval.errors import EvalError
from eval.output import LOCK_FILE, STATE_FILE, OutputFolder, problem_with
from eval.reading import read_object
from eval.results import RESULTS_FILE, SAMPLES_FILE, write_atomically
from eval.server import Server


TEXT = "another file, without a line end"


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    return path


def lock(folder):
    with OutputFolder(folder):
        pass


def keep(folder):
    with AnswerCache(folder / ANSWERS_FILE) as cache:
        cache.add("k", "answer")


def samples(folder):
    with OutputFolder(folder) as opened:
        opened.append(SAMPLES_FILE, [{"a": 1}])


def server(folder):
    with Server(["true"], "http://127.0.0.1:1", folder / "server.log"):
        pass


def scratch(folder):
    write_atomically(folder / "page", "text")


WRITERS = [(lock, LOCK_FILE), (keep, ANSWERS_FILE), (samples, SAMPLES_FILE), (server, "server.log"),
           (scratch, f".page.{os.getpid()}")]  # fmt: skip
IDS = [write.__name__ for write, _ in WRITERS]


@pytest.mark.parametrize(("write", "name"), WRITERS, ids=IDS)
def test_nothing_is_written_through_a_link(write, name, folder, victim):
    (folder / name).symlink_to(victim)
    with pytest.raises((EvalError, OSError), match="it is a link; move it away") as caught:
        write(folder)
    assert name in str(caught.value)
    assert victim.read_text() == TEXT
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "new")
    with pytest.raises((EvalError, OSError), match="it is a link; move it away"):
        write(folder)
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize(("write", "name"), WRITERS, ids=IDS)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_pipe_is_waited_for(write, name, make, folder):
    make(folder / name)
    with pytest.raises((EvalError, OSError), match="it is no plain file; move it away"):
        write(folder)


def test_a_pipe_or_a_device_in_place_of_what_is_read(folder):
    os.mkfifo(folder / STATE_FILE)
    assert f"{STATE_FILE} is no regular file" in problem_with(folder)
    (folder / STATE_FILE).unlink()
    (folder / STATE_FILE).symlink_to("/dev/zero")
    assert f"{STATE_FILE} is no regular file" in problem_with(folder)
    os.mkfifo(folder / RESULTS_FILE)
    with pytest.raises(EvalError, match="cannot be read"):
        read_object(folder / RESULTS_FILE)


def test_folders_that_lead_in_a_circle_cannot_be_compared(folder, tmp_path, capsys):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert compare.main([str(tmp_path / "one"), str(folder)]) == 2
    assert "Too many levels of symbolic links" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_one_message(folder, tmp_path, capsys):
    for words in ([str(folder), "x" * 300], [str(folder), str(tmp_path), "--out", "x" * 300]):
        assert compare.main(words) == 2
    assert samples_page.main(["x" * 300]) == 2
    assert capsys.readouterr().err.count("eval: error:") == 3


def test_a_hostile_folder_steers_no_terminal_and_a_name_of_bytes_can_be_said(tmp_path, capsys):
    name = os.fsdecode(b"\xff\x1b[2J\nsecond line")
    assert compare.main([str(tmp_path / name), str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert said.isascii()
