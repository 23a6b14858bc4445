"""Output of commands with ``--json``: one JSON document on standard output, and nothing else there."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any


@contextmanager
def kept_for_json(asked: bool) -> Iterator[None]:
    """Send what is printed within the context to standard error if JSON is asked for, by other processes, too."""
    if not asked:
        yield
        return
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(ours, 1)
        os.close(ours)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a document; letters outside ASCII are escaped, so that no text in it can steer a terminal."""
    print(json.dumps(_finite(document), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
