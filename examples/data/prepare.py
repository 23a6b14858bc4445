"""Writes the training files that ``dataset_info.json`` names, from the hub or from local JSON lines.

Run: ``python examples/data/prepare.py [NAME ...] [--data-dir FOLDER]``. The hub's columns cannot be used as they are:
answers are no texts, or choices are nested, and LLaMA-Factory drops such rows. ``--data-dir`` takes a folder with
``boolq/train.jsonl``, ``arc_easy/train.jsonl`` and so on, in the fields of the hub's sets.

Questions are worded as the task of ``eval/tasks`` asks them that scores the set (``README.md`` says which), and
answers as it reads them. Only training splits are written.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any


Row = dict[str, Any]
Text = dict[str, str]


@dataclass(frozen=True)
class DataSet:
    """A training set.

    Attributes:
        hub: arguments of ``datasets.load_dataset``.
        folder: where its rows lie in ``--data-dir``.
        convert: makes a text of a row.
        needs: fields that the hub's rows have and local ones may lack.
    """

    hub: dict[str, str]
    folder: str
    convert: Callable[[Row], Text]
    needs: tuple[str, ...]


def text(question: str, answer: str) -> Text:
    """Return a question and its answer in LLaMA-Factory's columns."""
    return {"instruction": question, "input": "", "output": answer}


def boolq_row(row: Row) -> Text:
    """Ask a yes/no question on its passage."""
    question = row["question"].rstrip().removesuffix("?")
    return text(f"{row['passage']}\nQuestion: {question}?\nAnswer:", "yes" if row["answer"] else "no")


def boolq_no_passage_row(row: Row) -> Text:
    """Ask a yes/no question alone, which tests what the model knows."""
    question = row["question"].rstrip().removesuffix("?")
    asked = f"Please answer the following question with true or false, question: {question}?"
    return text(f"{asked}\n\nAnswer format: true/false", f"the correct answer is {str(bool(row['answer'])).lower()}")


def arc_row(row: Row) -> Text:
    """Ask a multiple-choice question; choices are numbered from 1 whatever the source's labels are."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    choices = " ".join(f"Answer{number}: {choice}" for number, choice in enumerate(texts, 1))
    words = "/".join(f"answer{number}" for number in range(1, len(texts) + 1))
    asked = f"Please choose the correct answer to the question: {row['question']}"
    right = f"the correct answer is answer{labels.index(row['answerKey']) + 1}"
    return text(f"{asked}\n\n{choices}\n\nAnswer format: {words}", right)


def aqua_row(row: Row) -> Text:
    """Ask an algebra question with five choices.

    The answer is the letter alone: the first capital A to E counts, and a worked solution would begin with another.
    """
    choices = " ".join(f"({option[0]}) {option[2:].strip()}" for option in row["options"])  # written as "A)21"
    return text(f"{row['question']} Answer Choices: {choices}", f"The answer is ({row['correct']}).")


def copa_row(row: Row) -> Text:
    """Ask for the cause or the effect of what a premise tells."""
    relation = {"cause": "cause of this", "effect": "effect"}[row["question"]]
    asked = f"Please choose the correct solution to the question: {row['premise']} What was the {relation}?"
    choices = f"Solution1: {row['choice1']} Solution2: {row['choice2']}"
    right = f"the correct answer is solution{int(row['label']) + 1}"
    return text(f"{asked}\n\n{choices}\n\nAnswer format: solution1/solution2", right)


def sst2_row(row: Row) -> Text:
    """Ask for the sentiment of a sentence."""
    asked = "Tell whether the sentiment of the sentence is positive or negative."
    sentence = f"Sentence: {row['sentence'].strip()}"
    words = ("negative", "positive")
    return text(f"{asked}\n\n{sentence}\n\nAnswer format: positive/negative", words[int(row["label"])])


ARC_FIELDS = ("question", "choices", "answerKey")
DATA_SETS = {
    "boolq": DataSet({"path": "google/boolq"}, "boolq", boolq_row, ("question", "passage", "answer")),
    "boolq_no_passage": DataSet({"path": "google/boolq"}, "boolq", boolq_no_passage_row, ("question", "answer")),
    "arc_easy": DataSet({"path": "allenai/ai2_arc", "name": "ARC-Easy"}, "arc_easy", arc_row, ARC_FIELDS),
    "arc_challenge": DataSet(
        {"path": "allenai/ai2_arc", "name": "ARC-Challenge"}, "arc_challenge", arc_row, ARC_FIELDS
    ),
    "aqua": DataSet(
        {"path": "deepmind/aqua_rat", "name": "raw"}, "aqua", aqua_row, ("question", "options", "correct")
    ),
    "copa": DataSet(
        {"path": "aps/super_glue", "name": "copa"},
        "copa",
        copa_row,
        ("premise", "choice1", "choice2", "question", "label"),
    ),
    "sst2": DataSet({"path": "stanfordnlp/sst2"}, "sst2", sst2_row, ("sentence", "label")),
}


def local_rows(name: str, data_dir: Path) -> Iterator[Row]:
    """Yield the training rows of a local file.

    Raises:
        ValueError: there is no such file, or its first row lacks a field; the message says which.
    """
    dataset, path = DATA_SETS[name], data_dir / DATA_SETS[name].folder / "train.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    with open(path, encoding="utf-8") as file:
        rows = (json.loads(line) for line in file if line.strip())
        first = next(rows, None)
        lost = [field for field in dataset.needs if first is None or field not in first]
        if lost:
            raise ValueError(f"the rows of {path} have no field {', '.join(lost)}")
        yield from chain([first], rows)


def hub_rows(name: str) -> Iterator[Row]:
    """Yield the training rows of a data set of the hub."""
    from datasets import load_dataset

    yield from load_dataset(**DATA_SETS[name].hub, split="train")


def write(path: Path, rows: Iterable[Text]) -> int:
    """Write JSON lines; returns their number."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def prepare(names: list[str], data_dir: Path | None, out: Path) -> None:
    """Write the named sets, or all; of all, those that the local folder does not hold are left out with a word.

    Raises:
        SystemExit: a named set cannot be made of the local rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in names or DATA_SETS:
        target = out / f"{name}_train.jsonl"
        try:
            rows = hub_rows(name) if data_dir is None else local_rows(name, data_dir)
            print(f"{write(target, map(DATA_SETS[name].convert, rows)):,} rows in {target}")
        except ValueError as error:
            if names or data_dir is None:
                raise SystemExit(f"{name} cannot be written: {error}") from error
            print(f"{name} is left out: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(DATA_SETS)}")
    parser.add_argument("--data-dir", type=Path, help="local copies instead of the hub")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    options = parser.parse_args()
    if unknown := set(options.names) - set(DATA_SETS):
        parser.error(f"there is no data set {', '.join(sorted(unknown))}; choose from {', '.join(DATA_SETS)}")
    prepare(options.names, options.data_dir, options.out)
