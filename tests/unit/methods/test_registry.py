"""Names, suggestions and outside packages."""

from importlib.metadata import EntryPoint

import pytest

from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.methods import _registry


@pytest.fixture(autouse=True)
def _fresh():
    _registry.methods.cache_clear()
    yield
    _registry.methods.cache_clear()


def test_misspelt_names_get_a_suggestion():
    with pytest.raises(
        _registry.UnknownMethodError,
        match=r"'unifrom': registered are adalora, .*, uniform; try uniform",
    ):
        _registry.get_method("unifrom")


def test_an_outside_package_adds_a_method(monkeypatch):
    entry = EntryPoint("mine", "llamafactory_adaptive.methods.uniform:Uniform", _registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(_registry, "entry_points", lambda group: [entry])
    assert _registry.get_method("mine").__name__ == "Uniform"


def test_a_name_taken_twice_is_an_error(monkeypatch):
    entry = EntryPoint("random", "other:Thing", _registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(_registry, "entry_points", lambda group: [entry])
    with pytest.raises(AdaptiveError, match="'random' is registered twice"):
        _registry.methods()
