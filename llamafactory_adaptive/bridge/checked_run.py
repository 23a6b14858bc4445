"""A run's settings, read and validated once per process."""

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
        given: the settings as the host reads them: a mapping, or the words of a command line.
        args: the same settings as one flat mapping.
        config: the validated configuration.
    """

    given: Given
    args: Args
    config: AdaptiveConfig


# Set while the host's launcher runs in this process: the launcher passes no settings on to what it calls.
launched_run: ContextVar[CheckedRun | None] = ContextVar("adaptive_launch", default=None)


def checked_run(given: Given, host_too: bool) -> CheckedRun:
    """Validate the settings of an adaptive run, unless the launcher in this process has done so.

    In a process without torchrun, the host's parser alone reads them twice: here, where no device may be touched and
    every refusal becomes one message, and in the host's training function, which opens the devices.

    Args:
        given: the settings as the host reads them.
        host_too: whether to run the host's parser on them, too, and to test that ``output_dir`` can be written.

    Raises:
        AdaptiveConfigError: settings are invalid; the message gives every problem found.
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
