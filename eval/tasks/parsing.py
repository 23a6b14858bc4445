"""Answers out of generated text, as LLM-Adapters' evaluation scripts read them: the first word that can be an answer.

Each function takes a row and the responses to it (one) and returns metrics, as lm-evaluation-harness wants it.
"""

import re
from collections.abc import Sequence
from typing import Any

from eval import extraction


TOLERANCE = 0.001  # of a number against its label


def first_match(pattern: str, text: str) -> str:
    """The first match in ``text``, or an empty string, which is never right."""
    found = re.search(pattern, text.strip())
    return found.group(0) if found else ""


def boolq(row: dict[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """``true`` or ``false``, whichever comes first."""
    expected = "true" if row["label"] else "false"
    return {"acc": float(first_match("true|false", responses[0]) == expected)}


def arc(row: dict[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """``answer1`` to ``answer5``; choices are numbered from 1 whatever their labels are."""
    expected = f"answer{list(row['choices']['label']).index(row['answerKey']) + 1}"
    return {"acc": float(first_match("answer[1-5]", responses[0]) == expected)}


def copa(row: dict[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """``solution1`` or ``solution2``."""
    return {"acc": float(first_match("solution[12]", responses[0]) == f"solution{row['label'] + 1}")}


def aqua(row: dict[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """The first capital A to E anywhere, a word's first letter too: that is how the papers read it."""
    return {"acc": float(first_match("[A-E]", responses[0]) == row["correct"])}


def gsm8k(row: dict[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """``acc``: the last number within 0.001 of the label, as the papers do; beside it the other extractions."""
    text, label = responses[0], extraction.canonical(row["answer"].split("####")[-1])
    return {
        "acc": float(abs(extraction.last_number(text) - float(label)) <= TOLERANCE),
        "strict": float(extraction.canonical(extraction.strict(text)) == label),
        "flexible": float(extraction.canonical(extraction.flexible(text)) == label),
        "training": float(extraction.training_format(text) == label),
    }
