"""Ledgers of comparisons that are not finished, kept in results/ so that another machine goes on where one ended.

A run is known by its settings, among them the paths of the comparison's folder and of the model. In the kept file two
words stand in their place. Rows and model are known by what they hold as well, so that no others pass for them.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import record


LEDGER = "ledger.jsonl"
Places = Mapping[str, Path]  # paths by the words that stand for them
Words = list[tuple[str, str]]


def unfinished_file(name: str) -> Path:
    """Give the path of the kept ledger of a comparison."""
    return record.RESULTS / f"{name}.unfinished.jsonl"


def keep(name: str, folder: Path, places: Places) -> int:
    """Keep the ledger of a comparison, and return how many lines it has."""
    held = _read(folder / LEDGER)
    words = [(str(path), word) for word, path in places.items()]
    _write(unfinished_file(name), {key: _replaced(line, words) for key, line in held.items()})
    return len(held)


def bring_back(name: str, folder: Path, places: Places) -> int:
    """Add what was kept to the ledger of a comparison, and return how many lines were new to it."""
    words = [(word, str(path)) for word, path in places.items()]
    kept = [_replaced(line, words) for line in _read(unfinished_file(name)).values()]
    held = _read(folder / LEDGER)
    new = {key: line for line in kept if (key := _key(line)) not in held}
    if new:
        _write(folder / LEDGER, {**held, **new})
    return len(new)


def _read(path: Path) -> dict[str, str]:
    """Read lines by their settings; one that a kill cut short is left out."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return {_key(line): line for line in text.split("\n") if line.endswith("}")}


def _write(path: Path, lines: Mapping[str, str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines.values()), encoding="utf-8")


def _key(line: str) -> str:
    return json.dumps(json.loads(line)["settings"], sort_keys=True)


def _replaced(line: str, words: Words) -> str:
    """Replace the beginnings of all texts of a line; the longest first, since one path may lie in another."""
    ordered = sorted(words, key=lambda pair: -len(pair[0]))
    return json.dumps(_texts(json.loads(line), lambda text: _begun(text, ordered)))


def _begun(text: str, words: Words) -> str:
    for old, new in words:
        if text == old or text.startswith(f"{old}/"):
            return new + text.removeprefix(old)
    return text


def _texts(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, dict):
        return {key: _texts(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_texts(each, change) for each in value]
    return change(value) if isinstance(value, str) else value
