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


FILE = r"`(\w+(?:/\w+)+\.py)`"


def missing_from(page):
    """Find the files that a page names, and the functions and classes that it names behind one, that are not there."""
    files = {file: next((root / file for root in (PACKAGE, ROOT) if (root / file).is_file()), None)
             for file in re.findall(FILE, page)}  # fmt: skip
    held = {file: re.findall(r"^\s*(?:def|class) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            for file, path in files.items() if path}  # fmt: skip
    behind = re.findall(rf"{FILE}(?:\s+\(|:\s+)`(?:\w+\.)?(\w+)`", page)
    lost = [name for file, name in behind if file in held and name not in held[file]]
    return [file for file, path in files.items() if not path] + lost


def test_files_and_names_of_the_page_are_in_the_code():
    assert missing_from(PAGE) == []


@pytest.mark.parametrize(("there", "lost"), [("`comparison/ledger.py`", "`comparison/book.py`"),
                                             ("(`DeviceLoop`)", "(`Loop`)"),
                                             ("(`Triplets.mask`)", "(`Triplets.paint`)")])  # fmt: skip
def test_a_file_or_name_that_is_not_in_the_code_is_found(there, lost):
    assert missing_from(PAGE.replace(there, lost, 1)) == [re.sub(r"[`()]|Triplets\.", "", lost)]


def test_the_walks_are_as_many_as_are_told():
    told, walks = re.search(r"^## (\w+) walks\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE).groups()
    count = len(re.findall(r"^\*\*[^*]+\.\*\* ", walks, re.MULTILINE))
    assert told == {4: "Four", 5: "Five", 6: "Six"}[count]
    assert f"{told.lower()} walks through the code" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
