"""The tests stand where a reader looks for them."""

import re

import pytest

from tests.helpers.imports import imported
from tests.helpers.processes import ROOT


PACKAGE = ROOT / "llamafactory_adaptive"
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_imports_a_test_module(path):
    assert not [name for name in imported(path) if re.search(r"(^|\.)test_", name)]


def test_unit_tests_mirror_the_rooms():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.parent.name for path in (ROOT / "tests" / "unit").glob("*/test_*.py")}
    assert folders <= rooms
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "unit").glob("test_*.py")} <= modules
