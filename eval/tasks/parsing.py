"""Parsing of answers as in LLM-Adapters' evaluation scripts: the first word that can be an answer.

Functions named after a task take a row and the responses to it (one) and return metrics, as lm-evaluation-harness
requires. Those that begin with ``read`` take a response and return what each metric reads in it, for votes over
several answers.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval import extraction


TOLERANCE = 0.001  # of a number against its label


def first_match(pattern: str, text: str) -> str:
    """Return the first match in ``text``; an empty string, which is never right, where there is none."""
    match = re.search(pattern, text.strip())
    return match.group(0) if match else ""


def read_boolq(text: str) -> dict[str, str]:
    """Find ``true`` or ``false``, whichever comes first."""
    return {"acc": first_match("true|false", text)}


def read_arc(text: str) -> dict[str, str]:
    """Find the first of ``answer1`` to ``answer5``."""
    return {"acc": first_match("answer[1-5]", text)}


def read_copa(text: str) -> dict[str, str]:
    """Find the first of ``solution1`` and ``solution2``."""
    return {"acc": first_match("solution[12]", text)}


def read_aqua(text: str) -> dict[str, str]:
    """Find the first capital A to E anywhere, also inside a word, as the papers do."""
    return {"acc": first_match("[A-E]", text)}


def read_gsm8k(text: str) -> dict[str, str]:
    """Find the number that each of the four extractions reads in a text."""
    return {
        "acc": extraction.bounded(repr(extraction.last_number(text))),
        "strict": extraction.strict(text),
        "flexible": extraction.flexible(text),
        "training": extraction.training_format(text),
    }


def boolq(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """Compare the first ``true`` or ``false`` with the label."""
    return {"acc": float(read_boolq(responses[0])["acc"] == ("true" if row["label"] else "false"))}


def arc(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """Compare ``answerN`` with the key's place; choices are numbered from 1 whatever their labels are."""
    expected = f"answer{list(row['choices']['label']).index(row['answerKey']) + 1}"
    return {"acc": float(read_arc(responses[0])["acc"] == expected)}


def copa(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """Compare ``solutionN`` with the label."""
    return {"acc": float(read_copa(responses[0])["acc"] == f"solution{int(row['label']) + 1}")}


def aqua(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """Compare the first capital letter with the right one."""
    return {"acc": float(read_aqua(responses[0])["acc"] == row["correct"])}


def gsm8k(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """Score the number that each of the four extractions reads against the label.

    ``acc`` takes the last number, right within 0.001 of the label, as the papers do. ``strict`` and ``flexible`` are
    compared as lm-evaluation-harness compares them, ``training`` as a number.
    """
    text, label = responses[0], extraction.label_of(row["answer"])
    if label is None:  # nothing can be right
        return dict.fromkeys(("acc", "strict", "flexible", "training"), 0.0)
    return {
        "acc": float(abs(extraction.last_number(text) - float(label)) <= TOLERANCE),
        "strict": float(extraction.matches(extraction.strict(text), row["answer"])),
        "flexible": float(extraction.matches(extraction.flexible(text), row["answer"])),
        "training": float(extraction.final_value(text) == label),
    }
