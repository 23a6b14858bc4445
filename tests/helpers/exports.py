"""Exports that are refused."""

from pathlib import Path
from typing import Any

import pytest

from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.export import exporter
from llamafactory_adaptive.export.request import ExportRequest


def refusal(
    adapter: Path, tmp_path: Path, server: str = "peft", error: type[AdaptiveError] = AdaptiveError, **more: Any
) -> str:
    """Export an adapter that must be refused with nothing written; returns what is said."""
    with pytest.raises(error) as caught:
        exporter.run_export(ExportRequest(adapter, server, tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()
    return str(caught.value)
