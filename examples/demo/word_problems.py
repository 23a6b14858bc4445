"""Seeded arithmetic word problems in the style of GSM8K: the demo's data, so that nothing need be downloaded.

Run: ``python word_problems.py FOLDER [--train 320] [--held-out 48] [--seed 7]``. Writes two JSON-lines files and the
``dataset_info.json`` that names them; the held-out rows share no question with the training rows.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path


NAMES = ("Ana", "Ben", "Chloe", "Dev", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam")
THINGS = ("apples", "books", "candles", "eggs", "marbles", "pencils", "stamps", "tickets")


def _shopping(draw: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    count, price, paid = draw.randint(3, 12), draw.randint(2, 9), draw.choice((100, 120, 150))
    cost = count * price
    question = f"{name} buys {count} {thing} at ${price} each and pays with ${paid}. How much change does {name} get?"
    return (
        question,
        f"The {thing} cost {count} * {price} = ${cost}.\nThe change is {paid} - {cost} = ${paid - cost}.",
        (paid - cost),
    )


def _sharing(draw: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    friends, each, own = draw.randint(2, 9), draw.randint(2, 12), draw.randint(1, 15)
    total = friends * each + own
    question = (
        f"{name} has {total} {thing}, keeps {own} and shares the rest equally among {friends} friends. How many "
        f"{thing} does each friend get?"
    )
    return (
        question,
        f"{name} shares {total} - {own} = {total - own} {thing}.\nEach friend gets {total - own} / "
        f"{friends} = {each}.",
        each,
    )


def _collecting(draw: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    first, factor, lost = draw.randint(4, 20), draw.randint(2, 4), draw.randint(1, 6)
    second = first * factor
    total = first + second - lost
    question = (
        f"{name} collects {first} {thing} on Monday and {factor} times as many on Tuesday, then loses {lost}. How "
        f"many {thing} are left?"
    )
    return (
        question,
        f"On Tuesday {name} collects {first} * {factor} = {second}.\nTogether that is {first} + {second} = "
        f"{first + second}.\nAfter the loss {first + second} - {lost} = {total} are left.",
        total,
    )


KINDS: tuple[Callable[[random.Random, str, str], tuple[str, str, int]], ...] = (_shopping, _sharing, _collecting)


def generate(count: int, seed: int) -> list[dict[str, str]]:
    """``count`` different problems as instruction and output; the answer ends in ``#### N``."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        question, steps, answer = draw.choice(KINDS)(draw, draw.choice(NAMES), draw.choice(THINGS))
        rows[question] = {"instruction": question, "input": "", "output": f"{steps}\n#### {answer}"}
    return list(rows.values())


def write(folder: Path, train: int, held_out: int, seed: int) -> None:
    """Write both splits and their ``dataset_info.json``."""
    rows = generate(train + held_out, seed)
    folder.mkdir(parents=True, exist_ok=True)
    info = {}
    for name, part in (("word_problems", rows[:train]), ("word_problems_held_out", rows[train:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        info[name] = {"file_name": f"{name}.jsonl"}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=320)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    write(options.folder, options.train, options.held_out, options.seed)
