from importlib.metadata import PackageNotFoundError, version

import pytest

from llamafactory_adaptive import versions


def test_packages_that_are_missing_are_left_out():
    assert versions.installed_versions(("torch", "no-such-package")) == {"torch": version("torch")}


def test_a_fork_under_another_name_counts_as_what_it_is_imported_as(monkeypatch):
    published = {"forked-host": "0.9.6.dev0"}

    def version_of(name):
        if name not in published:
            raise PackageNotFoundError(name)
        return published[name]

    monkeypatch.setattr(versions, "version", version_of)
    monkeypatch.setattr(versions, "_published_as", lambda: {"llamafactory": ["forked-host"]})
    assert versions.installed_versions(("llamafactory", "peft")) == {"llamafactory": "0.9.6.dev0"}
    assert versions.host_version() == "0.9.6.dev0"
    monkeypatch.setattr(versions, "_published_as", dict)
    assert versions.host_version() == "of unknown version"


@pytest.mark.parametrize("module", ["yaml", "peft"])
def test_modules_are_known_by_what_they_are_published_as(module):
    assert versions.installed_versions((module,)).keys() == {module}
