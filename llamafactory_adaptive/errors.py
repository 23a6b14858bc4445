"""Errors that a user can act on, with their messages: one problem per wrong setting, all reported at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn


_LONGEST = 2000  # characters of one part of a message


class AdaptiveError(Exception):
    """A failure the user can act on; the command line prints it without a traceback and exits with 2."""


def _shortened(text: str) -> str:
    """Cut the middle out of a text that would fill the screen: a value of a megabyte, say."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


@dataclass(frozen=True)
class Problem:
    """One wrong setting: what it is, what would be allowed, and a value to try."""

    key: str
    value: Any
    allowed: str
    suggestion: str

    def __str__(self) -> str:
        parts = map(_shortened, (self.key, repr(self.value), self.allowed, self.suggestion))
        return "{}: {} is invalid: {}; try {}".format(*parts)


class AdaptiveConfigError(AdaptiveError, ValueError):
    """A wrong configuration, found before any model was loaded; holds every problem, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{len(self.problems)} problems in the configuration:{lines}"


def refuse(key: str, value: Any, allowed: str, suggestion: str, cause: BaseException | None = None) -> NoReturn:
    """Raise AdaptiveConfigError for one wrong setting; ``cause`` is the exception that revealed it, if any."""
    raise AdaptiveConfigError([Problem(key, value, allowed, suggestion)]) from cause


def refuse_all(*problems: Problem) -> None:
    """Raise AdaptiveConfigError with all problems; do nothing where there are none."""
    if problems:
        raise AdaptiveConfigError(problems)


def first_of(faults: Sequence[str], joint: str = "; ", most: int = 3) -> str:
    """Join the first faults into one text, and add how many more there are."""
    more = f" (and {len(faults) - most} more)" if len(faults) > most else ""
    return joint.join(faults[:most]) + more


class InfeasibleBudgetError(AdaptiveError, ValueError):
    """The rank bounds leave no allocation within the budget."""


class PlanError(AdaptiveError, ValueError):
    """A rank plan that cannot be read, or does not fit the model or the budget."""


class OutputError(AdaptiveError, RuntimeError):
    """A file or folder cannot be written, or another run works in it."""


class OtherProcessError(AdaptiveError, RuntimeError):
    """Another process of the job cannot go on; its message is quoted."""


class CalibrationError(AdaptiveError, RuntimeError):
    """Calibration could not produce trustworthy statistics."""


class EvaluationError(AdaptiveError, RuntimeError):
    """The evaluation harness cannot be run, or could not evaluate an adapter."""


class SeamError(AdaptiveError, RuntimeError):
    """The plugin cannot attach to LLaMA-Factory: it is switched off, or the host is missing or looks different."""


class GuardError(AdaptiveError, RuntimeError):
    """A run that was asked to be adaptive did not train or save what its plan says."""


class DivergedError(GuardError):
    """Losses, gradients or weights of a run are no longer finite."""
