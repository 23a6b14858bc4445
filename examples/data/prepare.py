"""Writes the BoolQ and ARC training files that ``dataset_info.json`` names, from the hub or from local JSON lines.

Run: ``python examples/data/prepare.py [--data-dir FOLDER]``. Hub columns cannot be used as they are: BoolQ's answer is
no text and ARC's choices are nested, and LLaMA-Factory drops such rows. ``--data-dir`` takes a folder with
``boolq/train.jsonl``, ``arc_easy/train.jsonl`` and ``arc_challenge/train.jsonl`` in the fields of the hub sets.

Answers read "the correct answer is ...", the wording whose parsing the adapter papers report. Only training splits are
written.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


HUB = {
    "boolq": {"path": "google/boolq"},
    "arc_easy": {"path": "allenai/ai2_arc", "name": "ARC-Easy"},
    "arc_challenge": {"path": "allenai/ai2_arc", "name": "ARC-Challenge"},
}


def boolq_row(row: dict[str, Any]) -> dict[str, str]:
    """A yes/no question; the passage comes along where the source has one."""
    passage = f"Passage: {row['passage']}\n\n" if row.get("passage") else ""
    question = f"{passage}Answer the question with true or false.\n\nQuestion: {row['question'].rstrip('?')}?"
    return {"instruction": question, "input": "", "output": f"the correct answer is {str(row['answer']).lower()}"}


def arc_row(row: dict[str, Any]) -> dict[str, str]:
    """A multiple-choice question; choices are numbered from 1 whatever the source's labels are."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    lines = "\n".join(f"Answer{number}: {text}" for number, text in enumerate(texts, 1))
    right = f"answer{labels.index(row['answerKey']) + 1}"
    words = ", ".join(f"answer{number}" for number in range(1, len(texts) + 1))
    question = f"Choose the right answer.\n\nQuestion: {row['question']}\n\n{lines}\n\nAnswer with one of {words}."
    return {"instruction": question, "input": "", "output": f"the correct answer is {right}"}


def source_rows(name: str, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    """Training rows from a local file or from the hub."""
    if data_dir is not None:
        with open(data_dir / name / "train.jsonl", encoding="utf-8") as file:
            yield from map(json.loads, file)
    else:
        from datasets import load_dataset

        yield from load_dataset(**HUB[name], split="train")


def write(path: Path, rows: Iterable[dict[str, str]]) -> int:
    """Write JSON lines; returns their number."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="local copies instead of the hub")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for dataset in HUB:
        convert = boolq_row if dataset == "boolq" else arc_row
        target = options.out / f"{dataset}_train.jsonl"
        print(f"{write(target, map(convert, source_rows(dataset, options.data_dir)))} rows in {target}")
