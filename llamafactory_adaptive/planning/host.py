"""The interface that planning needs of the program that trains."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from llamafactory_adaptive.calibration.measurement import Measurement
from llamafactory_adaptive.ranks.plan import ModuleShape


class HostRun(Protocol):
    """One training run of a host program.

    Attributes:
        shapes: the target modules in model order; cheap to read again.
        identity: everything that determines the statistics (weights, token rows, precision, versions), JSON-able.
        provenance: facts that the plan records of its origin; ``base_model``, ``architecture`` and ``seed`` at least.
        checkpoint: the checkpoint that the run resumes from, if any.
        adapter: the trained adapter that the host loads and goes on with, if any.
        given_keys: names of the adaptive settings that the user wrote.
    """

    @property
    def shapes(self) -> list[ModuleShape]: ...  # noqa: D102

    @property
    def identity(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def provenance(self) -> Mapping[str, Any]: ...  # noqa: D102

    @property
    def checkpoint(self) -> Path | None: ...  # noqa: D102

    @property
    def adapter(self) -> Path | None: ...  # noqa: D102

    @property
    def given_keys(self) -> Collection[str]: ...  # noqa: D102

    def measure(self, measurement: Measurement, path: Path) -> None:
        """Run a measurement on the host's model and data, and write the statistics to ``path``, in an empty folder."""
        ...
