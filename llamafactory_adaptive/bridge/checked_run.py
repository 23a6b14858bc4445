"""A run's settings, read and validated once a process."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, to_mapping
from llamafactory_adaptive.bridge.host_check import check_host_settings, check_output
from llamafactory_adaptive.bridge.validation import parse_config
from llamafactory_adaptive.config.run_config import AdaptiveConfig


Given = Mapping[str, Any] | list[str]


@dataclass(frozen=True)
class CheckedRun:
    """The settings of an adaptive run in which nothing wrong was found.

    Attributes:
        given: as the host reads them: a mapping, or the words of a command line.
        args: the same as one flat mapping.
        config: the validated configuration.
    """

    given: Given
    args: Args
    config: AdaptiveConfig


# Set while the host's launcher runs in this process: it passes no settings on to what it calls.
launched_run: ContextVar[CheckedRun | None] = ContextVar("adaptive_launch", default=None)


def checked_run(given: Given, host_too: bool) -> CheckedRun:
    """Validate the settings of an adaptive run, unless the launcher in this process has done so.

    The host's parser alone sees them twice in a process without torchrun: here, where no device may be touched and
    every refusal becomes one message, and in the host's training function, which opens the devices.

    Args:
        given: as the host reads them.
        host_too: whether the host's parser looks at them, too, and the folder to write into is tried.

    Raises:
        AdaptiveConfigError: with every problem found.
    """
    launched = launched_run.get()
    if launched is not None and launched.given is given:
        return launched
    args = to_mapping(given)
    config = parse_config(args)
    if host_too:
        check_output(args)
        check_host_settings(args)
    return CheckedRun(given, args, config)
