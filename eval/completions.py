"""Texts and likelihoods from the answers of a server, each of which is checked to be a valid completion."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.errors import EvalError
from eval.redaction import excerpt


_LONGEST = 2**24  # characters; the most tokens that can be asked for are a million
_ROUNDING = 1e-3  # a log-probability is at most 0, up to rounding


class BadAnswerError(EvalError):
    """An answer that is no valid completion, or does not fit the question."""


def texts(document: Any, expected: int) -> list[str]:
    """Return the generated texts, in the order of their index.

    Raises:
        BadAnswerError: there are not ``expected`` texts, or one is not a string.
    """
    return [_text(choice) for choice in _choices(document, expected)]


def likelihood(document: Any, tokens: int, context: int) -> tuple[float, bool]:
    """Sum the log-probabilities of a prompt's tokens after the first ``context``; tell whether each is the likeliest.

    Args:
        document: answer to a question with ``echo``, ``logprobs`` and one token to generate.
        tokens: number of tokens in the prompt. The answer must have a value for each and one for the generated token,
            in that order; the value of the first token is not read.
        context: number of leading tokens that are given and not scored, at least one.

    Raises:
        BadAnswerError: values are missing, or are no log-probabilities.
    """
    (choice,) = _choices(document, 1)
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        raise BadAnswerError("it returned no log-probabilities for the tokens of the prompt")
    values, tops = (_list_of(logprobs, name, tokens + 1)[context:-1] for name in ("token_logprobs", "top_logprobs"))
    numbers = [_log_probability(value) for value in values]
    greedy = [number == max(map(_log_probability, _top(top))) for number, top in zip(numbers, tops, strict=True)]
    return sum(numbers), all(greedy)


def _choices(document: Any, expected: int) -> list[Mapping[str, Any]]:
    if isinstance(document, Mapping) and document.get("error") is not None:
        raise BadAnswerError(f"it answered with an error: {excerpt(str(document['error']), 300)}")
    if isinstance(document, Mapping) and document.get("object") == "error":
        raise BadAnswerError(f"it answered with an error: {excerpt(str(document.get('message', '')), 300)}")
    choices = document.get("choices") if isinstance(document, Mapping) else None
    if not isinstance(choices, list) or not all(isinstance(choice, Mapping) for choice in choices):
        raise BadAnswerError("its answer is no completion: it has no list of choices")
    if len(choices) != expected:
        raise BadAnswerError(f"its answer has {len(choices)} choices where {expected} must be")
    order = [choice.get("index", at) for at, choice in enumerate(choices)]
    if sorted(order, key=str) != sorted(range(expected), key=str):
        raise BadAnswerError(f"its answer numbers its choices {excerpt(str(order), 99)}, not from 0 to {expected - 1}")
    return sorted(choices, key=lambda choice: choice.get("index", 0))


def _text(choice: Mapping[str, Any]) -> str:
    text = choice.get("text")
    if not isinstance(text, str):
        raise BadAnswerError(f"the text of its answer is {type(text).__name__}, not a text")
    if len(text) > _LONGEST:
        raise BadAnswerError(f"the text of its answer has {len(text)} characters, more than any --max-gen-toks allows")
    # Half of a surrogate pair can be neither written nor sent; what stands for it is U+FFFD.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _list_of(logprobs: Mapping[str, Any], name: str, expected: int) -> Sequence[Any]:
    values = logprobs.get(name)
    if not isinstance(values, list) or len(values) != expected:
        number = len(values) if isinstance(values, list) else "no list of"
        raise BadAnswerError(
            f"it returned {number} {name} for a prompt of {expected - 1} tokens and one generated token, where "
            f"{expected} must be"
        )
    return values


def _top(top: Any) -> Sequence[Any]:
    if not isinstance(top, Mapping) or not top:
        raise BadAnswerError("it returned no likeliest token (top_logprobs) for a token of the prompt")
    return list(top.values())


def _log_probability(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswerError(f"a log-probability of the prompt is {excerpt(str(value), 40)}, not a number")
    try:
        number = float(value)
    except OverflowError:  # a whole number may have thousands of digits
        number = math.inf
    if not math.isfinite(number) or number > _ROUNDING:
        raise BadAnswerError(f"a log-probability of the prompt is {number}: it must be finite and at most 0")
    return number
