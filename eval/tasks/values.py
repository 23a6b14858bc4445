"""Checks of the values of rows that are to be scored, made before a server starts rather than after all answers.

Each function takes a row that has all fields and returns a problem in words, or None.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

from eval import extraction


def boolq(row: Mapping[str, Any]) -> str | None:
    """Check the label (``answer`` in the original data set) and the question of a row of BoolQ."""
    name = "label" if row.get("label") is not None else "answer"
    if problem := _no_text(row, "question"):
        return problem
    return None if row[name] in (0, 1) else f"{name} is {row[name]!r:.60}: it must be true or false (1 or 0)"


def gsm8k(row: Mapping[str, Any]) -> str | None:
    """Check that the answer of a row of GSM8K is a number, or has one after its last ``####``."""
    if problem := _no_text(row, "question", "answer"):
        return problem
    if extraction.label_of(row["answer"]) is not None:
        return None
    return f"answer ends in {row['answer'][-40:]!r}: it must end in '#### N', N a number"


def arc(row: Mapping[str, Any]) -> str | None:
    """Check that a row of ARC has as many texts as labels, and a key that is one of the labels."""
    choices = row["choices"]
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, Mapping) else (None, None)
    if not _texts(texts) or not _texts(labels) or len(texts) != len(labels):
        return "choices must hold two lists of texts, text and label, of one length"
    if row["answerKey"] not in labels:
        return f"answerKey is {row['answerKey']!r:.60}: it must be one of the labels {', '.join(labels):.200}"
    return _no_text(row, "question")


def aqua(row: Mapping[str, Any]) -> str | None:
    """Check that a row of AQuA-RAT has at most five options, and the letter of one of them as the answer."""
    options = row["options"]
    if not _texts(options) or len(options) > 5:
        return "options must be a list of at most 5 texts"
    letters = "ABCDE"[: len(options)]
    if row["correct"] not in tuple(letters):
        return f"correct is {row['correct']!r:.60}: it must be one of {', '.join(letters)}"
    return _no_text(row, "question")


def copa(row: Mapping[str, Any]) -> str | None:
    """Check that a row of COPA asks for a cause or an effect, and has one of two choices as its label."""
    if problem := _no_text(row, "premise", "choice1", "choice2"):
        return problem
    if row["question"] not in ("cause", "effect"):
        return f"question is {row['question']!r:.60}: it must be cause or effect"
    return None if row["label"] in (0, 1) else f"label is {row['label']!r:.60}: it must be 0 or 1"


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _no_text(row: Mapping[str, Any], *names: str) -> str | None:
    """Describe the first of the fields that is not a text; None when all are."""
    problems = (f"{name} is {row[name]!r:.60}: it must be a text" for name in names if not isinstance(row[name], str))
    return next(problems, None)
