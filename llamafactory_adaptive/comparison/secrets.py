"""Tokens and keys of services: no result depends on them, and no file of a comparison may hold them."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any


_KEY = r"\w*(?:token|api_?key|password|secret|webhook(?:_url)?)"
_NAME = re.compile(_KEY)
_WORD = re.compile(rf"(--)?({_KEY})=.*", re.DOTALL)
_INSIDE = re.compile(rf"\b({_KEY})(['\"]?\s*[=:]\s*)[^\s,}}]+")  # in the text of an arm


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without tokens, keys and web hooks of services, in mappings within them too."""
    return {
        key: without_secrets(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if not _NAME.fullmatch(str(key))
    }


def redacted(words: Sequence[str]) -> str:
    """Join the words of a command as a shell reads them, with ``...`` in place of tokens and keys."""
    return shlex.join(_without_value(word) for word in words)


def _without_value(word: str) -> str:
    if match := _WORD.fullmatch(word):
        return f"{match[1] or ''}{match[2]}=..."
    return _INSIDE.sub(r"\1\2...", word)
