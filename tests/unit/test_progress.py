"""Progress is a bar on a terminal, lines for a process that reads them, and nothing in a pipe."""

import io
import sys

import pytest

from llamafactory_adaptive import progress
from llamafactory_adaptive.progress import LINES, watched


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
