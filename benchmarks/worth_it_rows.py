"""Rows of a regime of worth_it.py: asked as the harness asks them, so that what is trained can be scored by it."""

import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import record

from eval.protocols import Task, load_tasks
from eval.tasks.rows import boolq_row


GENERATED = 4000  # rows of each data set, where no folder is given
Pair = tuple[str, str]


def given(data: str | None) -> str | None:
    """Give the folder of the user's rows: the argument, or what the environment names."""
    return data or os.environ.get(record.DATA_ENV)


def source(data: str | None, scratch: Path, names: Sequence[str]) -> tuple[Path, str]:
    """Give the folder that holds ``NAME/train.jsonl`` for every name, and what the rows are called."""
    if (data := given(data)) is None:
        _generate(scratch, names)
        return scratch, "generated"
    for name in names:
        if not (file := Path(data) / name / "train.jsonl").is_file():
            raise SystemExit(f"{file} does not exist; --data takes a folder that holds {name}/train.jsonl")
    return Path(data), "+".join(names)


def _generate(scratch: Path, names: Sequence[str]) -> None:
    sys.path.insert(0, str(record.DEMO))
    import eval_rows

    for name in names:
        (scratch / name).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in eval_rows.generate(name, GENERATED, seed=7))
        (scratch / name / "train.jsonl").write_text(text, encoding="utf-8")


def pairs(folder: Path, names: Sequence[str]) -> list[Pair]:
    """Read question and answer of all rows, each question once, in one random order."""
    found = {question: answer for task in load_tasks("llm_adapters", names) for question, answer in _of(task, folder)}
    return random.Random(0).sample(list(found.items()), len(found))


def _of(task: Task, folder: Path) -> Iterator[Pair]:
    from jinja2 import Environment, StrictUndefined

    jinja = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    question, answer = (jinja.from_string(task.config[key]) for key in ("doc_to_text", "doc_to_target"))
    text = (folder / task.name / "train.jsonl").read_text(encoding="utf-8")
    for line in filter(None, text.split("\n")):  # not splitlines(): a row of GSM8K holds U+2028
        row = json.loads(line)
        row = boolq_row(row) if task.name == "boolq" else row
        yield question.render(row), answer.render(row)


def short(rows: Sequence[Pair], model: Path, tokens: int) -> list[Pair]:
    """Keep rows of at most that many tokens, in the format of the chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def length(question: str, answer: str) -> int:
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return len(tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"])

    return [row for row in rows if length(*row) <= tokens]


def write(parts: Mapping[str, Sequence[Pair]], folder: Path) -> None:
    """Write one data set per part, and the file that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {part: {"file_name": f"{part}.json"} for part in parts}
    for part, chosen in parts.items():
        texts = [{"instruction": question, "input": "", "output": answer} for question, answer in chosen]
        (folder / f"{part}.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
