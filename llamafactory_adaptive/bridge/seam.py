"""A seam: one attribute of a LLaMA-Factory module that the plugin replaces, and when that happens."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llamafactory_adaptive.versions import host_version, verified_versions


logger = logging.getLogger("llamafactory.adaptive")  # a child of the host's logger: its format, its handlers


@dataclass(frozen=True)
class Seam:
    """One attribute of a LLaMA-Factory module that the plugin replaces.

    Attributes:
        module, attribute: what is replaced.
        fits: whether the given attribute looks as expected.
        patch: returns the replacement of the given attribute.
        optional: whether runs go on without it.
        applied_with: module whose import the replacement waits for; empty for the attribute's own. Seams that are
            applied with one module are applied together or not at all.
        without: what users lose where it does not fit, logged then; empty for nothing to log.
    """

    module: str
    attribute: str
    fits: Callable[[Any], bool]
    patch: Callable[[Any], Any]
    optional: bool = False
    applied_with: str = ""
    without: str = ""

    @property
    def trigger(self) -> str:
        """Return the name of the module whose import applies the seam."""
        return self.applied_with or self.module

    @property
    def target(self) -> str:
        """Return the dotted name of the attribute, as shown to users."""
        return f"{self.module}.{self.attribute}"


def log_loss(lost: str, faults: str) -> None:
    """Write one line to the log of what users have to do without, since the host is another than expected."""
    version, tested = host_version(), verified_versions()
    logger.warning(f"{lost}: LLaMA-Factory {version} does not fit ({faults}); tested with {tested}")
