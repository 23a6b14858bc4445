"""Versions of installed packages, and of the hosts that are tested."""

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


VERIFIED_HOSTS = Path(__file__).with_name("verified_hosts.toml")


def host_version() -> str:
    """Return the version of LLaMA-Factory, or of the published fork that stands in for its main branch."""
    found = installed_versions(("llamafactory", "llamafactory-kt"))
    return next(iter(found.values()), "of unknown version")


def verified_hosts() -> list[dict[str, str]]:
    """Read the hosts on which the tests pass: ``version``, ``source``, ``constraints`` and ``tests`` of each."""
    hosts: list[dict[str, str]] = tomllib.loads(VERIFIED_HOSTS.read_text(encoding="utf-8"))["host"]
    return hosts


def verified_versions() -> str:
    """List the versions of LLaMA-Factory on which the tests pass, in one line."""
    return ", ".join(f"{host['version']} ({host['source']})" for host in verified_hosts())


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Look up the versions of packages, and leave out those that are not installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
