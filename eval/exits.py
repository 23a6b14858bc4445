"""How a command of the harness ends: with 0, or with a message for its user and 2, or with 130 where interrupted."""

import sys
from collections.abc import Callable, Sequence

from eval.errors import EvalError
from eval.redaction import guarded, without_control


def exit_code(words: Sequence[str], action: Callable[[], None]) -> int:
    """Run a command, with secrets removed from all that it prints, and return its exit code.

    Args:
        words: the command line, whose secrets are to be learned.
        action: what the command does.
    """
    with guarded(words):
        try:
            action()
        except EvalError as error:
            print(f"eval: error: {without_control(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
    return 0
