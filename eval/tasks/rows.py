"""Conversion of rows of the hub's data sets and of local files to one shape, before a task's templates see them."""

from typing import Any


def boolq(dataset: Any) -> Any:
    """Add ``label`` (0 no, 1 yes) to every row of BoolQ, and strip the question mark, as prompts write their own."""
    return dataset.map(boolq_row)


def boolq_row(row: dict[str, Any]) -> dict[str, Any]:
    """Add ``label`` to one row of BoolQ, and strip the question mark.

    SuperGLUE has ``label``; the original set and LLM-Adapters' copy have ``answer``, true or false.
    """
    label = row["label"] if row.get("label") is not None else int(row["answer"])
    return {**row, "label": int(label), "question": row["question"].rstrip().removesuffix("?")}


def aqua(dataset: Any) -> Any:
    """Add ``choices``, spelled ``(A)text``, and ``gold``, the index of the right one, to every row of AQuA-RAT."""
    return dataset.map(aqua_row)


def aqua_row(row: dict[str, Any]) -> dict[str, Any]:
    """Add ``choices`` and ``gold`` to one row of AQuA-RAT, which writes options as ``A)text``."""
    choices = ["(" + option if not option.startswith("(") else option for option in row["options"]]
    return {**row, "choices": choices, "gold": "ABCDE".index(row["correct"])}


def lower_first(text: str) -> str:
    """Lower the first letter of a choice of COPA, as it continues a sentence."""
    return text[:1].lower() + text[1:]


def copa_text(row: dict[str, Any]) -> str:
    """Join the premise, without its full stop, and the word that asks for a cause or an effect."""
    connector = {"cause": "because", "effect": "therefore"}[row["question"]]
    return f"{row['premise'].strip()[:-1]} {connector}"


def copa_choices(row: dict[str, Any]) -> list[str]:
    """List both continuations of a premise."""
    return [f" {lower_first(row[name])}" for name in ("choice1", "choice2")]


def copa_target(row: dict[str, Any]) -> str:
    """Return the right continuation of a premise."""
    return copa_choices(row)[int(row["label"])]
