"""The picture in docs/architecture.md shows the imports of the code."""

import re

import pytest

from tests.helpers.imports import imported
from tests.helpers.processes import ROOT


PACKAGE = ROOT / "llamafactory_adaptive"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
NODE = r'(\w+)(?:\["([^"]*)"\])?'


def read_picture(page):
    """Return the rooms by the picture's names for them, and its arrows as pairs of these names."""
    (picture,) = re.findall(r"```mermaid\n(.*?)```", page, re.DOTALL)
    arrows = re.findall(rf"{NODE} --> {NODE}", picture)
    assert len(arrows) == picture.count("-->")
    labels = {
        name: label for a, a_label, b, b_label in arrows for name, label in ((a, a_label), (b, b_label)) if label
    }
    rooms = {name: frozenset(label.partition(":")[0].split(", ")) for name, label in labels.items()}
    return rooms, {(a, b) for a, _, b, _ in arrows}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_between(rooms):
    """Find all pairs of nodes of the picture of which the first imports the second directly."""
    node_of = {room: node for node, members in rooms.items() for room in members}
    paths = [path for path in PACKAGE.rglob("*.py") if room_of(path) in node_of]
    names = ((path, name.split(".")) for path in paths for name in imported(path))
    pairs = {
        (node_of[room_of(path)], node_of[parts[1]])
        for path, parts in names
        if parts[0] == PACKAGE.name and parts[1] in node_of
    }
    return {(a, b) for a, b in pairs if a != b}


def closure(arrows):
    """Add an arrow for every chain of arrows."""
    more = arrows | {(a, d) for a, b in arrows for c, d in arrows if b == c}
    return arrows if more == arrows else closure(more)


def test_the_picture_names_every_room_and_every_module_beside_them():
    rooms, _ = read_picture(PAGE)
    shown = sorted(room for members in rooms.values() for room in members)
    assert shown == sorted({room_of(path) for path in PACKAGE.rglob("*.py")})


def test_every_arrow_is_an_import_and_every_import_follows_from_arrows():
    rooms, arrows = read_picture(PAGE)
    imports = imports_between(rooms)
    assert not arrows - imports, "the picture has arrows without an import"
    assert not imports - closure(arrows), "the picture lacks arrows"


@pytest.mark.parametrize("wrong", ["reports --> calibration", "ground --> cli"])
def test_an_arrow_without_an_import_is_found(wrong):
    rooms, arrows = read_picture(PAGE.replace("    engines --> ground", f"    engines --> ground\n    {wrong}"))
    assert arrows - imports_between(rooms) == {tuple(wrong.split(" --> "))}


@pytest.mark.parametrize("lost", ["adapter --> engines", "sampling --> methods", "engines --> ground"])
def test_an_import_without_an_arrow_is_found(lost):
    rooms, arrows = read_picture(PAGE)
    pair = tuple(lost.split(" --> "))
    assert pair in imports_between(rooms) - closure(arrows - {pair})
