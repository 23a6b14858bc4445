"""Names, suggestions and outside packages."""

from importlib.metadata import EntryPoint

import pytest

from llamafactory_adaptive import registry
from llamafactory_adaptive.errors import AdaptiveError


@pytest.fixture(autouse=True)
def _fresh():
    registry.methods.cache_clear()
    yield
    registry.methods.cache_clear()


def test_misspelt_names_get_a_suggestion():
    with pytest.raises(
        registry.UnknownMethodError,
        match=r"'unifrom': registered are adalora, igu, random, sensitivity, tsq, uniform; try uniform",
    ):
        registry.get_method("unifrom")


def test_an_outside_package_adds_a_method(monkeypatch):
    entry = EntryPoint("mine", "llamafactory_adaptive.methods.uniform:Uniform", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert registry.get_method("mine").__name__ == "Uniform"


def test_a_name_taken_twice_is_an_error(monkeypatch):
    entry = EntryPoint("random", "other:Thing", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(AdaptiveError, match="'random' is registered twice"):
        registry.methods()
