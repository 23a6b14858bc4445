"""Tests and their helpers stand where a reader looks for them, and no file is longer than one can survey."""

import re

import pytest

from tests.helpers.imports import imported
from tests.helpers.processes import ROOT


PACKAGE = ROOT / "llamafactory_adaptive"
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = [*PACKAGE.rglob("*.py"), *(ROOT / "eval").rglob("*.py"), *TESTS]
MOST_LINES = 300
WITHOUT_UNIT_TESTS = {
    "_bootstrap": "runs in interpreters of its own: contract/test_seams",
    "folder_lock": "locks what other modules write: unit/test_files, unit/bridge/test_training_run, e2e/test_trust",
    "paths": "is reached through a YAML and a command line: contract/test_odd_values",
    "seeding": "draws for methods: unit/methods/test_dynamic_methods",
}


def part_of(path):
    """First folder below ``tests``: ``unit``, ``eval``, ``helpers`` and so on."""
    return path.relative_to(ROOT / "tests").parts[0]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_a_test_module(path):
    assert not [name for name in imported(path) if re.search(r"(^|\.)test_", name)]


def test_what_several_folders_share_is_among_the_helpers():
    """A module beside the tests, and a script that they start by its path, serve the tests of their folder alone."""
    own = {path: part_of(path) for path in TESTS if not re.match(r"test_|conftest|__init__", path.name)}
    own = {path: part for path, part in own.items() if part != "helpers"}
    assert own, "the rule is about something"
    strangers = []
    for test in TESTS:
        names, text = set(imported(test)), test.read_text(encoding="utf-8")
        for path, part in own.items():
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            used = f'"{path.name}"' in text or any(f"{name}.".startswith(f"{module}.") for name in names)
            if used and part_of(test) != part:
                strangers.append(f"{test.relative_to(ROOT)} uses {path.relative_to(ROOT)}")
    assert strangers == []


def test_unit_tests_mirror_the_rooms():
    unit = ROOT / "tests" / "unit"
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.parent.name for path in unit.glob("*/test_*.py")} == rooms
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert {path.stem.removeprefix("test_") for path in unit.glob("test_*.py")} == modules - set(WITHOUT_UNIT_TESTS)
    assert set(WITHOUT_UNIT_TESTS) <= modules


def test_no_file_is_longer_than_one_can_survey():
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_make_test_names_every_folder_of_tests_but_faults():
    """Named one by one, since their order decides how long the last file is waited for."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ntest: ")[1].split("\n\n")[0]
    named = re.findall(r"tests/(\w+)", recipe)
    folders = {part_of(path) for path in TESTS if path.name.startswith("test_")}
    assert sorted(named) == sorted(folders - {"faults"})
