r"""Extraction of numbers from worked solutions.

One figure alone misleads: how answers are read moves GSM8K by many points.

* strict: the first ``#### N``, as lm-evaluation-harness reads and compares it (as text, so 18.00 is not 18). Low for a
  model that was not trained to write it.
* flexible: the last number, read and compared in the same way. A model that rambles on after its answer loses it.
* training format: the final answer in a form that training data ends with: ``#### N`` (GSM8K), "the answer is N"
  (MetaMath, LLM-Adapters) or ``\boxed{N}`` (MATH). Compared as numbers, exactly: 18.00 is 18, 3/4 is 0.75.
* last number: LLM-Adapters' own reading, a number within 0.001 of the label.

Which final answer counts in the training format, when there are several:

1. The text ends where another question begins ("Question:", "### Instruction:", "Problem 2:", a chat turn ...) after a
   first number was written.
2. Statements have a weight: 2 for ``####``, ``\boxed`` and "final answer", 1 for "the answer is" and "answer:"; 0 for
   any of them that does not end its sentence or line (a step: ``\boxed{5} eggs are left, so ...``) and for numbered
   headings (``#### 1. Title``).
3. The first statement of the greatest weight counts, unless the model corrects itself: a later statement after "wait",
   "actually", "correction", "mistake", "wrong" and the like takes its place.
4. Where the statement is no single number (a date, a range, a sum without its result, a division by zero), there is no
   answer: ``[invalid]``. The same holds for numbers of more than 100 digits and numbers in words.

Every function takes time in proportion to the length of its text, whatever the text is.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple

from eval.numerals import Reading, read, spell, tidied, value_of


STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
NOT_FOUND = "[invalid]"
MAX_ANSWER = 1000  # characters; lm-evaluation-harness's comparison is quadratic in them

_BLANK = r"[\s*_`]{0,8}"
_MARKER = re.compile(
    rf"(?P<hashes>####)|(?P<box>\\f?boxed\s{{0,4}}\{{)|(?P<final>\bfinal{_BLANK})?\b(?:answer|ans)s?"
    rf"(?:\s{{1,4}}to\s{{1,4}}(?:the|this)\s{{1,4}}(?:question|problem))?{_BLANK}"
    r"(?:is|are|was|would\sbe|will\sbe|equals|=|:)",
    re.IGNORECASE,
)
# What may stand between "the answer is" and its number. Each piece is bounded, and so is the number of pieces.
_FILLER = re.compile(
    r"\n\s{0,4}[-+\u2022]\s|\s{1,50}|[*_`\"'\u201c\u201d(\[{:~>=]{1,8}|"
    r"\\(?:text|math|mbox|bf|rm|quad|displaystyle)[a-z]{0,6}\s?|"
    r"(?:that|about|approximately|approx\.?|around|roughly|exactly|just|only|simply|therefore|thus|then|now|"
    r"equal\sto|equals|is|EUR|USD|GBP|US|Rs\.?)(?![a-z])|[a-z]\w{0,15}\s?=",
    re.IGNORECASE,
)
_PIECES = 12
_STATEMENTS = 1000  # of one text at most
_BOX = re.compile(r"\\f?boxed\s{0,4}\{")
_BOX_LENGTH = 200
_BRACE = re.compile(r"[{}]")
_STARTS = re.compile(r"(?:[-+]\s?)?(?:\.?\d|\\frac)", re.ASCII)
_OPERATORS = re.compile(r"[-+*/^<>|\u00d7\u00f7\u221a\u03c0]")
_SQUARED_UNIT = re.compile(r"(?<=[a-zA-Z}])\s?\^\s?\{?[23]\}?|\^\s?\{?\s?\\circ\s?\}?")
_SUM = re.compile(r"(?:[\d +\-*/\u00d7\u00f7()%=]|[.,](?=\d)|[xX](?= ?\d))*+", re.ASCII)
_SENTENCE_ENDS = re.compile(r"[^\n.!?\d]{0,40}+(?:\Z|\n|[.!?](?!\d))")
_NUMBERED_HEADING = re.compile(r"[.):]\s{0,3}[*_]{0,2}[A-Za-z]")
_ANOTHER_QUESTION = re.compile(
    r"\n[ \t>*#_\[]{0,8}(?:(?:next|new|another)\s)?(?:question|q|problem|exercise|example|instruction|input|user|"
    r"human)\s?\d{0,4}[ *_]{0,3}[:.)\]]|<\|(?:im_start|user|start_header_id)\|>|\[INST\]",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:wait|actually|correction|corrected|sorry|oops|mistaken?|wrong|incorrect|not right|not correct|re-?check|"
    r"double[- ]check|re-?calculat|let me re|hmm|on second thought|made an error|no,)",
    re.IGNORECASE,
)
_AFTER, _BEFORE = 200, 60  # characters after a statement, and before the next, that are searched for a correction
_THINKING = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)


class _Statement(NamedTuple):
    start: int
    end: int
    weight: int
    value: Fraction | None


def strict(text: str) -> str:
    """Return the number after the first ``####``, or ``[invalid]`` where there is none."""
    match = re.search(STRICT, text)
    return bounded(match.group(1)) if match else NOT_FOUND


def flexible(text: str) -> str:
    """Return the last piece of text that looks like a number, or ``[invalid]`` where there is none."""
    numbers = re.findall(FLEXIBLE, text)
    return bounded(next(part for part in numbers[-1] if part).strip()) if numbers else NOT_FOUND


def bounded(answer: str) -> str:
    """Return an answer, or ``[invalid]`` for one of more than ``MAX_ANSWER`` characters."""
    return answer if len(answer) <= MAX_ANSWER else NOT_FOUND


def matches(answer: str, target: str) -> bool:
    """Compare an answer with a worked solution as lm-evaluation-harness does for GSM8K: as text."""
    return compared(answer) == compared(target)


def compared(text: str) -> str:
    """Reduce a text to what lm-evaluation-harness compares for GSM8K.

    The text becomes lower case and loses ``,``, ``$``, everything up to the last ``#### ``, and a final full stop.
    """
    plain = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return re.sub(r"\.$", "", plain).lower()


def training_format(text: str) -> str:
    """Return the final answer in the training format, canonical (``1,234.50`` is ``1234.5``), or ``[invalid]``."""
    value = final_value(text)
    return NOT_FOUND if value is None else spell(value)


def final_value(text: str) -> Fraction | None:
    """Return the value of the final answer that counts by the rules of this module; None where there is none."""
    text = _first_solution(tidied(text))
    counts: _Statement | None = None
    for statement in _statements(text):
        if counts is None or statement.weight > counts.weight or _corrected(text, counts, statement):
            counts = statement
    return counts.value if counts else None


def last_number(text: str) -> float:
    """Return the last number in a text without its commas, as LLM-Adapters does; infinity where there is none."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(numbers[-1]) if numbers else float("inf")


def is_number(text: str) -> bool:
    """Tell whether a text is a single number, apart from currency signs and thousands separators."""
    return value_of(text) is not None


def canonical(number: str) -> str:
    """Return the shortest spelling of a number, without currency signs and thousands separators.

    Text that is no number is returned without the blanks around it.
    """
    value = value_of(number)
    return number.strip() if value is None else spell(value)


def label_of(answer: str) -> Fraction | None:
    """Return the value of a worked solution's label, which follows the last ``####``; None where it is no number."""
    return value_of(answer.rpartition("####")[2])


def training_filter(responses: Iterable[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Apply :func:`training_format` as a filter of lm-evaluation-harness: responses per row, in and out.

    lm-evaluation-harness compares texts, so a value equal to the label's is spelt as the label is.
    """
    return [[_spelt_as(doc, text) for text in row] for row, doc in zip(responses, docs, strict=True)]


def _spelt_as(doc: Mapping[str, Any], text: str) -> str:
    value, answer = final_value(text), str(doc.get("answer", ""))
    if value is None:
        return NOT_FOUND
    return compared(answer) if value == label_of(answer) else spell(value)


def bounded_filter(responses: Iterable[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Apply :func:`bounded` as a filter of lm-evaluation-harness."""
    return _each(bounded, responses)


def thinking_filter(responses: Iterable[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Apply :func:`without_thinking` as a filter of lm-evaluation-harness."""
    return _each(without_thinking, responses)


def _each(function: Callable[[str], str], responses: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[function(text) for text in row] for row in responses]


def without_thinking(text: str) -> str:
    """Strip ``<think>...</think>`` blocks; return an empty text where one is not closed, as no answer follows it.

    A block that the prompt opened has only its end in the text: everything before that is dropped.
    """
    kept, depth, at = [], 0, 0
    for tag in _THINKING.finditer(text):
        if depth == 0:
            kept.append(text[at : tag.start()])
        if not tag[1]:
            depth += 1
        elif depth:
            depth -= 1
        else:
            kept.clear()
        at = tag.end()
    return "" if depth else "".join([*kept, text[at:]]).strip()


def _first_solution(text: str) -> str:
    """Cut a text off where another question begins.

    A question before the first number does not count: it only repeats what was asked.
    """
    number = re.search(r"\d", text)
    next_question = _ANOTHER_QUESTION.search(text, number.start()) if number else None
    return text[: next_question.start()] if next_question else text


def _statements(text: str) -> Iterator[_Statement]:
    for marker in islice(_MARKER.finditer(text), _STATEMENTS):
        reading = _in_box(text, marker.end()) if marker["box"] else _after(text, marker.end())
        if reading is None:
            continue
        weight = 2 if marker["hashes"] or marker["box"] or marker["final"] else 1
        if not _SENTENCE_ENDS.match(text, reading.end) or (
            marker["hashes"] and _NUMBERED_HEADING.match(text, reading.end)
        ):
            weight = 0
        yield _Statement(marker.start(), reading.end, weight, reading.value)


def _corrected(text: str, counts: _Statement, later: _Statement) -> bool:
    after = text[counts.end : min(counts.end + _AFTER, later.start)]
    before = text[max(counts.end, later.start - _BEFORE) : later.start]
    return bool(_CORRECTION.search(after) or _CORRECTION.search(before))


def _after(text: str, at: int, boxed: bool = False) -> Reading | None:
    """Read the number after a statement, past a few words and signs, or the result of the sum written there."""
    for _ in range(_PIECES):
        if reading := read(text, at):
            return _result(text, at) or reading
        box = None if boxed else _BOX.match(text, at)
        if box:
            return _in_box(text, box.end())
        filler = _FILLER.match(text, at)
        if filler is None:
            return None
        at = filler.end()
    return None


def _result(text: str, at: int) -> Reading | None:
    """Read the number after the last equals sign of a sum that begins at ``at``; None where there is none."""
    line = _SUM.match(text, at, at + _BOX_LENGTH)
    equals = line.group().rfind("=") if line else -1
    if equals < 0:
        return None
    begin = at + equals + 1
    return read(text, begin + len(text[begin : begin + 8]) - len(text[begin : begin + 8].lstrip()))


def _in_box(text: str, at: int) -> Reading | None:
    """Read the single number of a box, whatever words are around it, and the place behind the closing brace."""
    end = _closing(text, at)
    if end is None:  # the text was cut off: read what there is
        return _after(text, at, boxed=True)
    content = text[at:end]
    content = content[content.rfind("=") + 1 :]
    start = _STARTS.search(content)
    if start is None:
        return None
    before, number = content[: start.start()].rstrip(" {*"), read(content, start.start())
    value = number.value if number else None
    rest = _SQUARED_UNIT.sub("", content[number.end :]) if number else ""
    signed = start.group()[0] in "-+"
    if _OPERATORS.search(before) or (signed and before[-1:].isalnum()) or re.search(r"\d|[\u03c0\u221a]", rest):
        value = None
    return Reading(value, end + 1)


def _closing(text: str, at: int) -> int | None:
    """Find the brace that closes the one before ``at``; None where none does within ``_BOX_LENGTH`` characters."""
    depth = 1
    for brace in _BRACE.finditer(text, at, at + _BOX_LENGTH):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return brace.start()
    return None
