r"""Numbers out of worked solutions. One figure alone misleads: what counts as an answer moves GSM8K by many points.

* strict: the first ``#### N``, as lm-evaluation-harness reads it. Low for a model that was not trained to write it.
* flexible: the last number, as lm-evaluation-harness reads it. A model that rambles on after its answer loses it.
* training format: the last final answer in a form that training data ends with: ``#### N`` (GSM8K), "the answer is N"
  (MetaMath, LLM-Adapters) or ``\boxed{N}`` (MATH). Compared as numbers, so 18.00 is 18 and 3/4 is 0.75.
* last number: LLM-Adapters' own reading, a number within 0.001 of the label.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any


STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
NOT_FOUND = "[invalid]"
_NUMBER = r"\\?\$?\s*(-?\\?\$?\s*\d[\d,]*(?:\.\d+)?)(?:\s*/\s*(\d+))?"
_FINAL = re.compile(
    rf"(?:####\s*|answer\s+is:?\s*(?:\*\*)?\\?\(?\s*|\\boxed\{{\s*(?:\\text\{{\s*)?){_NUMBER}", re.IGNORECASE
)


def strict(text: str) -> str:
    """The number after the first ``####``, or ``[invalid]``."""
    found = re.search(STRICT, text)
    return found.group(1) if found else NOT_FOUND


def flexible(text: str) -> str:
    """The last thing that looks like a number, or ``[invalid]``."""
    found = re.findall(FLEXIBLE, text)
    return next(part for part in found[-1] if part).strip() if found else NOT_FOUND


def training_format(text: str) -> str:
    """The last final answer in a form of training data, canonical (``1,234.50`` is ``1234.5``), or ``[invalid]``."""
    found = _FINAL.findall(text)
    if not found:
        return NOT_FOUND
    number, divisor = found[-1]
    if not divisor:
        return canonical(number)
    return canonical(repr(float(canonical(number)) / int(divisor))) if int(divisor) else NOT_FOUND


def last_number(text: str) -> float:
    """The last number with commas dropped, infinity when there is none (LLM-Adapters)."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else float("inf")


def is_number(text: str) -> bool:
    """Whether a text is a finite number, but for signs of currency and thousands."""
    try:
        return math.isfinite(float(re.sub(r"[,$\s]", "", text).rstrip(".")))
    except ValueError:
        return False


def canonical(number: str) -> str:
    """A number's shortest spelling, without signs of currency and thousands; other text comes back as it is."""
    plain = re.sub(r"[,$\\\s]", "", number).rstrip(".")
    if not is_number(plain):
        return plain
    value = float(plain)
    return str(int(value)) if value == int(value) else repr(value)


def training_filter(responses: Iterable[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """:func:`training_format` as a filter of lm-evaluation-harness: responses per row, in and out."""
    return [[training_format(text) for text in row] for row in responses]
