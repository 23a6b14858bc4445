"""What the command line says of itself."""

import argparse

import pytest

from llamafactory_adaptive.cli.parser import MEASURE, build_parser, parse_command_line


def commands():
    [subcommands] = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return subcommands.choices


ARGUMENTS = [
    (name, action) for name, parser in commands().items() for action in parser._actions if action.dest != "help"
]


@pytest.mark.parametrize(("command", "action"), ARGUMENTS, ids=[f"{name} {a.dest}" for name, a in ARGUMENTS])
def test_every_argument_has_help_with_an_example(command, action):
    assert "e.g. " in (action.help or ""), f"{command}: {action.dest}"


@pytest.mark.parametrize("command", commands())
def test_the_example_of_a_command_is_one_that_it_takes(command):
    _, _, example = commands()[command].epilog.partition("example: llamafactory-adaptive ")
    assert parse_command_line(example.split()).command == command


def test_what_is_internal_is_shown_nowhere(capsys):
    for words in (["--help"], ["nonsense"], [MEASURE]):
        with pytest.raises(SystemExit):
            parse_command_line(words)
    said = capsys.readouterr()
    assert "export" in said.out
    assert MEASURE not in said.out
    assert MEASURE not in said.err.replace(f"'{MEASURE}'", "", 1), "but as the word that is refused"
    assert str(parse_command_line([MEASURE, "answer.json"]).answer) == "answer.json"
