"""Versions of installed packages, and of the hosts that are tested."""

import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path


VERIFIED_HOSTS = Path(__file__).with_name("verified_hosts.toml")


def host_version() -> str:
    """Return the version of LLaMA-Factory, or of a fork that is imported by its name."""
    return installed_versions(("llamafactory",)).get("llamafactory", "of unknown version")


def verified_hosts() -> list[dict[str, str]]:
    """Read the hosts on which the tests pass: ``version``, ``source``, ``constraints`` and ``tests`` of each."""
    hosts: list[dict[str, str]] = tomllib.loads(VERIFIED_HOSTS.read_text(encoding="utf-8"))["host"]
    return hosts


def verified_versions() -> str:
    """List the versions of LLaMA-Factory on which the tests pass, in one line."""
    return ", ".join(f"{host['version']} ({host['source']})" for host in verified_hosts())


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Look up the versions of packages, and leave out those that are not installed.

    A fork that is published under another name counts as the package that it is imported as.
    """
    found = {name: _version(name) for name in packages}
    return {name: number for name, number in found.items() if number is not None}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return next((version(fork) for fork in _published_as().get(package, ())), None)


@cache  # reads what every installed package contains
def _published_as() -> Mapping[str, list[str]]:
    """Map the names that modules are imported by to those that they are published under."""
    return packages_distributions()
