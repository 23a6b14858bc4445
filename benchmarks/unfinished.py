"""Ledgers of comparisons that are not finished, kept in results/ so that another machine goes on where one ended.

A run is known by its settings, among them the paths of the comparison's folder and of the model. In the kept file two
words stand in their place. Rows and model are known by what they hold as well, so that no others pass for them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import record
from shipped import change_texts

from llamafactory_adaptive.comparison.ledger import LEDGER, Ledger
from llamafactory_adaptive.files import digest_of


Places = Mapping[str, Path]  # paths by the words that stand for them
Line = dict[str, Any]  # settings, and result


def unfinished_file(name: str) -> Path:
    """Give the path of the kept ledger of a comparison."""
    return record.RESULTS / f"{name}.unfinished.jsonl"


def keep(name: str, folder: Path, places: Places) -> int:
    """Keep the ledger of a comparison, and return how many lines it has."""
    lines = _lines(folder / LEDGER, {str(path): word for word, path in places.items()})
    unfinished_file(name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return len(lines)


def bring_back(name: str, folder: Path, places: Places) -> int:
    """Add what was kept to the ledger of a comparison, and return how many lines were new to it."""
    ledger = Ledger(folder / LEDGER)
    kept = _lines(unfinished_file(name), {word: str(path) for word, path in places.items()})
    new = [line for line in kept if line["settings"] not in ledger]
    for line in new:
        ledger.add(**line)
    return len(new)


def _lines(path: Path, words: Mapping[str, str]) -> list[Line]:
    """Read the lines of a ledger, with words put in the place of paths, or paths in that of words."""
    ordered = sorted(words.items(), key=lambda pair: -len(pair[0]))  # one path may lie in another

    def changed(text: str) -> str:
        for old, new in ordered:
            if text == old or text.startswith(f"{old}/"):
                return new + text.removeprefix(old)
        return text

    entries = [(json.loads(key), result) for key, result in Ledger(path).entries.items()]
    # Answers name the run that gave them by the digest of its settings, which change with the paths in them.
    digests = {digest_of(settings): digest_of(change_texts(settings, changed)) for settings, _ in entries}

    def moved(text: str) -> str:
        return digests.get(text) or changed(text)

    return [change_texts({"settings": settings, "result": result}, moved) for settings, result in entries]
