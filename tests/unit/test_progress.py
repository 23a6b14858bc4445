"""Progress is a bar on a terminal, lines for a process that reads them, and nothing in a pipe."""

import io
import sys
from contextlib import contextmanager

import pytest

from llamafactory_adaptive import progress
from llamafactory_adaptive.progress import LINES, Followed, watched


@pytest.fixture
def heard(monkeypatch):
    """What is written to standard error, which is a terminal if the test says so."""

    def hear(terminal):
        stream = io.StringIO()
        stream.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return hear


def test_in_a_pipe_there_is_none(heard):
    stream = heard(terminal=False)
    assert list(watched([1, 2, 3], "Scoring")) == [1, 2, 3]
    assert stream.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_that_goes_again_unless_it_is_to_be_quiet(heard):
    stream = heard(terminal=True)
    assert list(watched([1, 2, 3], "Scoring", quiet=True)) == [1, 2, 3]
    assert stream.getvalue() == ""
    assert list(watched([1, 2, 3], "Scoring [x]")) == [1, 2, 3]
    assert "Scoring [x]" in stream.getvalue()
    assert "3/3" in stream.getvalue()


def test_for_another_process_there_are_lines_a_second_apart_and_a_last_one(heard, monkeypatch):
    stream, now = heard(terminal=False), [100.0]
    monkeypatch.setenv(*next(iter(LINES.items())))
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for number in watched(range(8), "Scoring"):
        now[0] = 100.0 + 0.3 * number
    said = ["Scoring: 12% (1/8)", "Scoring: 62% (5/8)", "Scoring: 100% (8/8)"]
    assert stream.getvalue().splitlines() == said


def test_the_lines_of_another_process_move_a_bar_that_makes_room_for_others_and_goes_at_the_end(heard, monkeypatch):
    stream, shown = heard(terminal=True), []

    @contextmanager
    def bar(what, total):
        shown.append([what, total, 0])
        yield lambda: shown[-1].__setitem__(2, shown[-1][2] + 1)
        shown.append("removed")

    with monkeypatch.context() as patch:
        patch.setattr(progress, "_bar", bar)
        followed = Followed()
        for line in ("Scoring: 12% (1/8)", "no progress", "Scoring: 62% (5/8)"):
            followed.follow(line)
        assert shown == [["Scoring", 8, 5]]
        followed.remove()
        followed.follow("Scoring: 75% (6/8)")
        followed.follow("Scoring: 100% (8/8)")
        followed.follow("Held-out loss [x]: 50% (1/2)")
        assert shown == [["Scoring", 8, 5], "removed", ["Scoring", 8, 8], "removed", ["Held-out loss [x]", 2, 1]]
        followed.remove()
    Followed().follow("Scoring: 100% (8/8)")
    assert "8/8" in stream.getvalue()
    assert "Scoring: 100%" not in stream.getvalue()
