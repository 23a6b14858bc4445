"""What a run resumes from, and what of its settings decides that."""

import json
from pathlib import Path

import pytest

from llamafactory_adaptive.bridge.resuming import named_paths


def test_the_layout_of_a_run_is_read_from_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory_adaptive.bridge.resuming import layout

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    path = tmp_path / "z.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}))
    expected = {"deepspeed_stage": 2, "round_robin_gradients": True, "processes": 2}
    assert layout({"deepspeed": str(path)}) == expected
    assert layout({}) == {"deepspeed_stage": None, "round_robin_gradients": False, "processes": 2}


def test_a_zero_byte_in_the_settings_names_no_path():
    assert named_paths({"run_name": "a\0b", "output_dir": "out"}) == []
