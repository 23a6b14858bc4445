import sys

import pytest
import yaml
from accelerate import PartialState

from tests.helpers.tiny import unmeasured_settings


@pytest.fixture(autouse=True)
def _words(monkeypatch):
    """The host reads sys.argv, which a command sets."""
    monkeypatch.setattr(sys, "argv", ["llamafactory-adaptive"])
    yield
    PartialState._reset_state()


@pytest.fixture
def write(tiny_llama, data_dir, tmp_path):
    def make(like=unmeasured_settings, **more):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(like(tiny_llama, data_dir, tmp_path / "out", **more)))
        return path

    return make
