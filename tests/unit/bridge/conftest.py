"""Folders of two nodes."""

from pathlib import Path

import pytest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for rank in range(2):
        (tmp_path / f"node{rank}" / "out").mkdir(parents=True)
    return tmp_path
