"""Seeded rows for the four tasks of the evaluation demo, in the fields of the real sets: nothing is downloaded.

Run: ``python eval_rows.py FOLDER [--rows 64] [--seed 11]``. Writes ``FOLDER/TASK/{train,dev}.jsonl``. The word
problems share no question with those that the demo trains on. Easy arithmetic and reading, no benchmark.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import word_problems


Row = dict[str, Any]
_TRAINED_ON = {row["instruction"] for row in word_problems.generate(368, seed=7)}
_LABELS = "ABCD"


def gsm8k(draw: random.Random) -> Row:
    """A word problem the demo did not train on, and its solution."""
    while True:
        (row,) = word_problems.generate(1, seed=draw.randrange(2**32))
        if row["instruction"] not in _TRAINED_ON:
            return {"question": row["instruction"], "answer": row["output"]}


def boolq(draw: random.Random) -> Row:
    """A passage of two facts and a question that compares them."""
    first, second = draw.sample(word_problems.NAMES, 2)
    thing = draw.choice(word_problems.THINGS)
    one, two = draw.sample(range(2, 60), 2)
    passage = f"{first} has {one} {thing} in a box at home. {second} has {two} {thing} in a bag at school."
    return {"passage": passage, "question": f"does {first} have more {thing} than {second}", "answer": one > two}


def _choices(draw: random.Random, question: str, right: str, wrong: list[str]) -> Row:
    texts = [right, *wrong]
    draw.shuffle(texts)
    label = list(_LABELS[: len(texts)])
    answer = label[texts.index(right)]
    return {"question": question, "choices": {"text": texts, "label": label}, "answerKey": answer}


def arc_easy(draw: random.Random) -> Row:
    """Which of four numbers is the largest."""
    numbers = sorted(draw.sample(range(10, 1000), 4))
    thing = draw.choice(word_problems.THINGS)
    question = f"Four children count their {thing}. Which count is the largest of {', '.join(map(str, numbers))}?"
    return _choices(draw, question, str(numbers[-1]), [str(n) for n in numbers[:-1]])


def arc_challenge(draw: random.Random) -> Row:
    """A word problem with four answers."""
    row = gsm8k(draw)
    right = int(row["answer"].rsplit("#### ", 1)[1])
    wrong = draw.sample([right + step for step in (-12, -7, -3, 2, 5, 9, 14) if right + step >= 0], 3)
    return _choices(draw, row["question"], str(right), [str(n) for n in wrong])


KINDS: dict[str, Callable[[random.Random], Row]] = {
    "gsm8k": gsm8k, "boolq": boolq, "arc_easy": arc_easy, "arc_challenge": arc_challenge,
}  # fmt: skip


def generate(task: str, count: int, seed: int) -> list[Row]:
    """``count`` rows of one task with different questions."""
    draw, rows = random.Random(f"{task} {seed}"), {}
    while len(rows) < count:
        row = KINDS[task](draw)
        rows[row["question"]] = row
    return list(rows.values())


def write(folder: Path, rows: int, seed: int) -> None:
    """Write ``dev`` and a few ``train`` rows (examples to show) per task; no question stands in both."""
    for task in KINDS:
        made = generate(task, rows + 16, seed)
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, part in (("dev", made[:rows]), ("train", made[rows:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=11)
    options = parser.parse_args()
    write(options.folder, options.rows, options.seed)
