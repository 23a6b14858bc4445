"""Removal of secrets from files, logs, warnings and messages before they are written. Standard library only.

A secret is the value of an environment variable that is named like one (``OPENAI_API_KEY``, ``HF_TOKEN``, ...), what
follows such an option on the command line, and whatever stands behind ``Bearer`` in a header.
"""

import contextlib
import functools
import html.entities
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO


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
_SLASHES = r"\\{1,8}"  # before an escape; JSON inside JSON doubles them
_learned: set[str] = set()


def clean(text: str) -> str:
    """Replace every secret whose value is known, and the token of every ``Bearer`` header, by ``***``."""
    escaped = any(mark in text for mark in "\\%&+")
    for value, forms in _patterns(frozenset((*_learned, *_of_environment()))):
        text = forms.sub(HIDDEN, text) if escaped else text.replace(value, HIDDEN)
    return _BEARER.sub(rf"\g<1>{HIDDEN}", text)


def clean_values(value: Any) -> Any:
    """Remove secrets from every text inside lists and mappings; other values stay as they are."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean_values(key): clean_values(inner) for key, inner in value.items()}
    return [clean_values(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@contextlib.contextmanager
def guarded(words: Sequence[str]) -> Iterator[None]:
    """Remove secrets from all that is printed inside the block, also those in the command line ``words``."""
    _learned.update(_secrets_of(words))
    out, err = _CleanStream(sys.stdout, without_control), _CleanStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


class _CleanStream:
    """A text stream that removes secrets from what it passes on, and escapes what its encoding cannot hold.

    Standard error also shows progress bars, which need control characters: there, :func:`without_control` is applied
    to each message instead.
    """

    def __init__(self, stream: TextIO, also: Callable[[str], str] = str) -> None:
        self._stream, self._also = stream, also

    def write(self, text: str) -> int:
        """Write a text to the stream without its secrets."""
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(self._also(clean(text)).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def redacted(words: Sequence[str]) -> str:
    """Join ``words`` to one shell line with every secret shown as ``***``, also within ``--server-args``."""
    return clean(shlex.join(shown for _, shown in _shown(words)))


def _secrets_of(words: Sequence[str]) -> Iterator[str]:
    """Yield the values of a command line that must be hidden in every other text too."""
    for word, shown in _shown(words):
        if shown == HIDDEN:
            yield word
        elif shown != word and word.startswith("-"):
            yield word.partition("=")[2]
        for pattern in (_IN_JSON, _IN_QUERY):
            yield from (match.group(2) for match in pattern.finditer(word))


def _shown(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pair every word of a command line with what may be shown of it.

    vLLM's ``--api-key`` takes several values: all up to the next option are hidden.
    """
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
        except ValueError:  # no command line: which of its words are secret is unknown
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


@functools.lru_cache(maxsize=8)
def _patterns(values: frozenset[str]) -> Sequence[tuple[str, re.Pattern[str]]]:
    """Pair each value, longest first, with an expression that finds it however its characters are escaped."""
    secrets = {stripped for value in values if len(stripped := value.strip()) >= _SHORTEST}
    return [(value, re.compile(_any_form(value))) for value in sorted(secrets, key=lambda value: (-len(value), value))]


def _any_form(value: str) -> str:
    """Build an expression for a value in any mix of escapes.

    Writers differ in which characters they escape, and in how they do.
    """
    parts = re.findall(r"\\+|[^\\]", value)
    # Of backslashes before the first character all are taken, at once: half an escape is no JSON.
    first = "|".join(_written(parts[0])).replace(_SLASHES, r"\\(?<!\\\\)\\*")
    return f"(?:{first})" + "".join(f"(?:{'|'.join(_written(part))})" for part in parts[1:])


@functools.cache
def _written(part: str) -> Sequence[str]:
    """List expressions for what JSON, a URL, HTML and ``repr`` write for one character or a run of backslashes."""
    code, times = ord(part[0]), len(part)
    if part[0] == "\\":
        return rf"\\{{{times},{8 * times}}}", f"(?:{'|'.join(_escapes(code))}){{{times}}}"
    short = {"\n": "n", "\r": "r", "\t": "t", '"': '"', "'": "'", "/": "/"}.get(part)
    blank = [r"\+"] if part == " " else []
    return re.escape(part), *_escapes(code), *blank, *([_SLASHES + short] if short else [])


def _escapes(code: int) -> Iterator[str]:
    character = chr(code)
    raw = character.encode("utf-8", "surrogateescape" if 0xDC80 <= code <= 0xDCFF else "surrogatepass")
    yield "".join(f"%{_digits(byte, 2)}" for byte in raw)
    units = character.encode("utf-16-be", "surrogatepass")
    yield "".join(f"{_SLASHES}u{_digits(int.from_bytes(units[at : at + 2]), 4)}" for at in range(0, len(units), 2))
    yield f"{_SLASHES}(?:x{_digits(code, 2)}|U{_digits(code, 8)})"
    yield f"&#(?:0{{0,6}}{code}|[xX]0{{0,6}}{_digits(code, 1)});"
    yield from (f"&{name}" for name, named in html.entities.html5.items() if named == character and name[-1] == ";")


def _digits(number: int, width: int) -> str:
    """Build an expression for a number in hexadecimal, its letters in either case."""
    return "".join(f"[{d}{d.upper()}]" if d.isalpha() else d for d in f"{number:0{width}x}")


def without_control(text: str) -> str:
    """Replace characters that could control a terminal by ``?``; line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def excerpt(text: str, longest: int) -> str:
    """Return the beginning of an untrusted text for a message: one line, without secrets and control characters.

    Secrets are removed before the text is cut, as half a secret would no longer be found. Passwords in addresses (of a
    proxy, say) are removed too.
    """
    plain = " ".join(without_control(clean(text[: longest + _CLEANED_BEFORE_CUT])).split())
    return _USER.sub(HIDDEN, plain[: longest + _LONGEST_USER])[:longest]


def secrets_given(words: Iterable[str]) -> bool:
    """Tell whether a server's command line has an option that takes a secret."""
    return any(_is_secret_option(word.partition("=")[0]) for word in words if word.startswith("-"))
