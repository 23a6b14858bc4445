"""Command lines as they may be written down: without keys, tokens and the user part of addresses."""

import re
import shlex
from collections.abc import Iterator, Sequence


HIDDEN = "***"
_SECRET = re.compile(r"--(api[-_]key|hf[-_]token|.*password.*)")
_USER = re.compile(r"(?<=://)\S+(?=@)")  # up to the last @: a password may hold one; rather too much than too little


def redacted(words: Sequence[str]) -> str:
    """``words`` as one shell line, every secret shown as ``***``; a command line within ``--server-args`` too."""
    return shlex.join(_shown(words))


def _shown(words: Sequence[str]) -> Iterator[str]:
    option = ""  # vLLM's --api-key takes several words: all up to the next option are hidden
    for word in words:
        name, equals, value = word.partition("=")
        if option == "--server-args" or not word.startswith("--"):
            yield _value(option, word)
            option = option if _SECRET.fullmatch(option) else ""
        else:
            option = name
            yield f"{name}={_value(name, value)}" if equals else name


def _value(option: str, value: str) -> str:
    if _SECRET.fullmatch(option):
        return HIDDEN
    if option == "--server-args":
        return redacted(shlex.split(value))
    return _USER.sub(HIDDEN, value)
