"""What the tests of export share: a tiny base, and an adapter of it with mixed ranks."""

import pytest

from llamafactory_adaptive.export.verify import compare
from tests.helpers.lora import save_adapter
from tests.helpers.tiny import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path):
    return save_adapter(base, tmp_path / "adapter")


@pytest.fixture
def no_model_is_loaded(monkeypatch, request):
    if "loads" not in request.keywords:
        monkeypatch.setattr(compare, "load", lambda *words: pytest.fail("a model was loaded"))
