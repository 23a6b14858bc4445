"""Tables on a terminal have the figures of the text in a pipe; neither lets a name steer the terminal."""

import re

import pytest

from llamafactory_adaptive import cli
from llamafactory_adaptive.ranks.plan import ModulePlan
from llamafactory_adaptive.reports import terminal
from llamafactory_adaptive.reports.tables import rank_table
from tests.helpers.plans import found_plan, make_plan
from tests.helpers.runs import save_run


@pytest.fixture
def on_terminal(monkeypatch):
    monkeypatch.setattr(terminal, "on_terminal", lambda: True)
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "120", "TERM": "xterm", "COLORTERM": "truecolor"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def words(text):
    return re.sub(r"\x1b\[[0-9;]*m|[─\s]+", " ", text).split()


def test_in_a_pipe_a_plan_is_plain_text(capsys):
    terminal.print_plan(found_plan())
    assert capsys.readouterr().out == rank_table(found_plan()) + "\n"


def test_on_a_terminal_it_has_the_same_words_in_colour(on_terminal, capsys):
    terminal.print_plan(found_plan())
    said = capsys.readouterr().out
    assert words(said) == words(rank_table(found_plan()))
    assert re.search(r"\x1b\[[0-9;]*m\s*6\s*\x1b\[0m", said), "ranks have shades"


def test_sixteen_colours_are_too_few_for_shades(on_terminal, capsys, monkeypatch):
    monkeypatch.delenv("COLORTERM")
    terminal.print_plan(found_plan())
    said = capsys.readouterr().out
    assert words(said) == words(rank_table(found_plan()))
    assert not re.search(r"\x1b\[[0-9;]*m\s*6\s*\x1b\[0m", said)


def test_a_name_is_neither_markup_nor_a_command(on_terminal, capsys):
    terminal.print_plan(make_plan(method="[red]x[/]", modules=(ModulePlan("m.0.\x1b[2Jw", 8, 8, 2),)))
    said = capsys.readouterr().out
    assert "[red]x[/]" in said
    assert "\x1b[2J" not in said
    assert r"\x1b[2Jw" in said


def test_runs_are_compared_in_tables(on_terminal, tmp_path, capsys):
    runs = [str(save_run(tmp_path / name)) for name in ("one", "two")]
    assert cli.main(["report", *runs]) == 0
    said = words(capsys.readouterr().out)
    assert " ".join(words("two sensitivity 240 3-5 2 2.4000 1.5000 40 4.0 s")) in " ".join(said)
    assert "noise;" in said


def test_a_report_in_a_pipe_has_no_control_characters(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["report", str(save_run(tmp_path / "out"))]) == 0
    said = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in said)
