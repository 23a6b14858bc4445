"""Secrets are written nowhere: one place through which files, logs, warnings and messages pass. Standard library only.

A secret is the value of an environment variable that is named like one (``OPENAI_API_KEY``, ``HF_TOKEN``, ...), what
follows such an option on the command line, and whatever stands behind ``Bearer`` in a header.
"""

import contextlib
import functools
import html
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO
from urllib.parse import quote


HIDDEN = "***"
_SHORTEST = 6  # a shorter value ("true", "1") stands in too many harmless places
_CLEANED_BEFORE_CUT = 2**16  # characters behind those that are shown
_LONGEST_USER = 1000  # of name and password in an address
_VARIABLE = re.compile(r"(.*_)?(API_?KEY|ACCESS_KEY|TOKEN)|.*(SECRET|PASSWORD|PASSWD|CREDENTIAL).*", re.I)
_OPTION = re.compile(r"-.*((api|access)[-_.]?key|token[-_.]?key|password|passwd|secret).*|-.*[-_.]token", re.I)
_ABBREVIATED = ("--api-key", "--hf-token")  # vLLM takes any beginning that is unique
_NAME = r"[\w.-]*(?:api[-_]?key|access[-_]?key|token(?![a-z])|secret|password|passwd|signature)[\w.-]*"
_IN_JSON = re.compile(rf"""(["']{_NAME}["']\s*:\s*["'])([^"']*)""", re.I)
_IN_QUERY = re.compile(rf"([?&;]{_NAME}=)([^&#\s'\"]*)", re.I)
_BEARER = re.compile(r"(\bBearer\s+)(?=[^\s'\"\\]*[\d_-])[^\s'\"\\,;)}\]]+")  # JSON around it stays JSON
_USER = re.compile(r"(?<=://)\S+(?=@)")  # up to the last @: a password may hold one; rather too much than too little
_PERCENT = re.compile(r"%[0-9A-F]{2}")
_learned: set[str] = set()


def clean(text: str) -> str:
    """Replace every secret that is known by its value, and every ``Bearer`` header, by ``***``."""
    for form in _forms(frozenset((*_learned, *_of_environment()))):
        text = text.replace(form, HIDDEN)
    return _BEARER.sub(rf"\g<1>{HIDDEN}", text)


def clean_values(value: Any) -> Any:
    """Clean every text inside lists and mappings; other values stay as they are."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean_values(key): clean_values(inner) for key, inner in value.items()}
    return [clean_values(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def guarded(words: Sequence[str]) -> Iterator[None]:
    """Clean all that is printed inside the block, also of secrets that stand in the command line ``words``."""
    _learned.update(_secrets_of(words))
    out, err = _CleanStream(sys.stdout, without_control), _CleanStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _CleanStream:
    """A text stream that cleans what it passes on; what its encoding cannot hold (a name's bytes) it escapes.

    Standard error is for progress bars too, which steer the terminal: messages there go through
    :func:`without_control` one by one.
    """

    def __init__(self, stream: TextIO, also: Callable[[str], str] = str) -> None:
        self._stream, self._also = stream, also

    def write(self, text: str) -> int:
        """Pass cleaned text on."""
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(self._also(clean(text)).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redacted(words: Sequence[str]) -> str:
    """``words`` as one shell line, every secret shown as ``***``; a command line within ``--server-args`` too."""
    return clean(shlex.join(shown for _, shown in _shown(words)))


def _secrets_of(words: Sequence[str]) -> Iterator[str]:
    """The values that :func:`redacted` hides as a whole, where they are long enough to be told from other text."""
    for word, shown in _shown(words):
        if shown == HIDDEN:
            yield word
        elif shown != word and word.startswith("-"):
            yield word.partition("=")[2]
        for pattern in (_IN_JSON, _IN_QUERY):
            yield from (match.group(2) for match in pattern.finditer(word))


def _shown(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every word beside what may be shown of it. vLLM's ``--api-key`` takes several: all up to the next option."""
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if option == "--server-args" or not word.startswith("-"):
            yield word, _value(option, word)
            option = option if _is_secret_option(option) else ""
        else:
            option = name
            yield word, f"{name}={_value(name, value)}" if equals else name


def _value(option: str, value: str) -> str:
    if _is_secret_option(option):
        return HIDDEN
    if option == "--server-args":
        try:
            inner = shlex.split(value)
        except ValueError:  # no command line: nobody knows what a word of it means
            return HIDDEN
        _learned.update(_secrets_of(inner))
        return redacted(inner)
    for pattern in (_IN_JSON, _IN_QUERY):
        value = pattern.sub(rf"\g<1>{HIDDEN}", value)
    return _USER.sub(HIDDEN, value)


def _is_secret_option(option: str) -> bool:
    plain = option.replace("_", "-")
    short = len(plain) > 3 and any(full.startswith(plain) for full in _ABBREVIATED)
    return short or bool(_OPTION.fullmatch(option))


def _of_environment() -> Iterator[str]:
    return (value for name, value in os.environ.items() if _is_secret_name(name))


@functools.cache
def _is_secret_name(name: str) -> bool:
    return bool(_VARIABLE.fullmatch(name))


def _lowered(found: re.Match[str]) -> str:
    return found.group().lower()


@functools.lru_cache(maxsize=8)
def _forms(values: frozenset[str]) -> Sequence[str]:
    """Each value as it is and as JSON, a URL, HTML and Python's ``repr`` write it, longest first.

    Some writers of JSON escape ``/``, some of URLs write ``%2f`` small.
    """
    forms: set[str] = set()
    for value in (value.strip() for value in values):
        if len(value) >= _SHORTEST:
            forms |= {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1],
                      quote(value, safe=""), html.escape(value), repr(value)[1:-1]}  # fmt: skip
            forms |= {json.dumps(value)[1:-1].replace("/", "\\/"), _PERCENT.sub(_lowered, quote(value, safe=""))}
    return sorted(forms, key=lambda form: (-len(form), form))


def without_control(text: str) -> str:
    """Text of others for a terminal: characters that could steer it become ``?``; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def excerpt(text: str, longest: int) -> str:
    """The beginning of a text of others, for a message: one line, without secrets and control characters.

    It is cleaned before it is cut: the first half of a secret is one, too, and would not be known for it. So are
    passwords in addresses (of a proxy, say).
    """
    plain = " ".join(without_control(clean(text[: longest + _CLEANED_BEFORE_CUT])).split())
    return _USER.sub(HIDDEN, plain[: longest + _LONGEST_USER])[:longest]


def secrets_given(words: Iterable[str]) -> bool:
    """Whether a server's command line holds an option that takes a secret."""
    return any(_is_secret_option(word.partition("=")[0]) for word in words if word.startswith("-"))
