"""Errors that a user of the harness can act on."""

from collections.abc import Sequence


class EvalError(Exception):
    """A failure the user can act on; the command line prints it without a traceback and exits with 2."""


class UsageError(EvalError):
    """Wrong settings, found before anything was started; every problem, not only the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} problems:{lines}"
