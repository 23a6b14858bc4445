"""Ledgers of comparisons that are not finished, put away in results/ so that another machine goes on where one ended.

``NAME.unfinished.jsonl`` holds runs of ours for whoever wants to go on from them, and is read with ``--go-on`` alone:
without it every run of ``make worth-it`` is the user's own. No page and no figure is made of these files. One beside
a recorded ledger (``NAME.ledger.jsonl``) holds more than that: runs of arms that are not finished, and settings in
full, so that another arm can join runs that were made. What was fixed at each start goes with it
(``NAME.unfinished.starts.json``), so that a change after results were seen is told. Delete both where nobody will go
on.

A run is known by its settings, among them the paths of the comparison's folder and of the model. In the kept file two
words stand in their place. Rows and model are known by what they hold as well, so that no others pass for them.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import record
from shipped import change_texts

from llamafactory_adaptive.comparison.ledger import LEDGER, Ledger
from llamafactory_adaptive.comparison.starts import STARTS_FILE
from llamafactory_adaptive.files import digest_of, write_atomically


Places = Mapping[str, Path]  # paths by the words that stand for them
Line = dict[str, Any]  # settings, and result


def unfinished_file(name: str) -> Path:
    """Give the path of the kept ledger of a comparison."""
    return record.RESULTS / f"{name}.unfinished.jsonl"


def starts_file(name: str) -> Path:
    """Give the path of what was fixed at the starts of a comparison that is put away."""
    return record.RESULTS / f"{name}.unfinished.starts.json"


def put_away(name: str, folder: Path | None, places: Callable[[Path], Places]) -> int:
    """Put the ledger of a comparison away, beside lines that were before, and return how many lines it has.

    Args:
        name: name of the comparison's result.
        folder: folder of the comparison, which ``--keep`` names.
        places: gives the paths of a folder's comparison.

    Raises:
        SystemExit: there is no such folder, or no line in its ledger.
    """
    if folder is None:
        raise SystemExit("--put-away takes the runs of a folder, which --keep names")
    lines = _lines(folder / LEDGER, {str(path): word for word, path in places(folder).items()})
    if not lines:
        raise SystemExit(f"there is no run in {folder / LEDGER} that could be put away")
    held = [*_lines(unfinished_file(name), {}), *lines]
    texts = {json.dumps(line["settings"], sort_keys=True): json.dumps(line) for line in held}
    if (starts := folder / STARTS_FILE).is_file():
        noted = [{key: value for key, value in start.items() if key != "eval-data"}  # a path
                 for start in json.loads(starts.read_text(encoding="utf-8"))]  # fmt: skip
        write_atomically(starts_file(name), json.dumps(noted, indent=1) + "\n")
    write_atomically(unfinished_file(name), "".join(f"{text}\n" for text in texts.values()))
    return len(lines)


def bring_back(name: str, folder: Path, places: Places) -> int:
    """Add what was put away to the ledger of a comparison, and return how many lines were new to it.

    Raises:
        SystemExit: nothing was put away.
    """
    if not unfinished_file(name).is_file():
        raise SystemExit(f"--go-on: there is no {unfinished_file(name)} to go on from; leave --go-on out")
    ledger, starts = Ledger(folder / LEDGER), starts_file(name)
    if starts.is_file() and not (folder / STARTS_FILE).exists():
        write_atomically(folder / STARTS_FILE, starts.read_text(encoding="utf-8"))
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
