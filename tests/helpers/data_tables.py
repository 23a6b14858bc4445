"""Tables of data sets, as LLaMA-Factory reads them, without their data."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_data_table(folder: Path, table: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write a ``dataset_info.json``, and files with nothing in them for those that it names."""
    (folder / "dataset_info.json").write_text(json.dumps(table))
    for entry in table.values():
        if "file_name" in entry:
            (folder / entry["file_name"]).touch()
    return folder
