"""``llamafactory-adaptive doctor``: versions, the start-up hook, whether each seam fits, and a verdict."""

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive import __version__, _bootstrap
from llamafactory_adaptive.cli.host import host_is_installed, install_host
from llamafactory_adaptive.cli.json_output import kept_for_json, print_json
from llamafactory_adaptive.errors import first_of
from llamafactory_adaptive.versions import installed_versions, verified_versions


HOOK_FILE = "llamafactory_adaptive_hook.pth"
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def doctor(arguments: argparse.Namespace) -> int:
    """Check the installation; return 0 where adaptive runs will work through ``llamafactory-cli``, else 2.

    Where LLaMA-Factory is not installed, only that is printed and 0 returned: the Python API works.
    """
    with kept_for_json(arguments.json):
        facts = _examined() if host_is_installed() else _without_host()
    if arguments.json:
        print_json(facts)
    else:
        print("\n".join(_lines(facts)))
    return 0 if facts["ready"] else 2


def _without_host() -> dict[str, Any]:
    """Tell what works where LLaMA-Factory is not installed: the Python API, which is not at fault."""
    words = (
        f"plugin {__version__}: the Python API is ready (from llamafactory_adaptive import ...); LLaMA-Factory is "
        f"not installed, so `finetuning_type: adaptive` does not exist here; to have it: {install_host()}"
    )
    return {"schema_version": 1, "ready": True, "verdict": words, "plugin": __version__, "host_installed": False}


def _examined() -> dict[str, Any]:
    """Check hook, versions and seams; the keys are described in ``docs/reports.md``."""
    hooked, versions = _hook_is_active(), installed_versions(PACKAGES)
    states, names, optional = _host_states()
    ready, words = _verdict(hooked, {**states, **names})
    return {
        "schema_version": 1,
        "ready": ready,
        "verdict": words,
        "plugin": __version__,
        "host_installed": True,
        "hook_active": hooked,
        "switch": os.environ.get(_bootstrap.ENV_SWITCH),
        "start_up_file": str(_start_up_file()) if _start_up_file().is_file() else None,
        "python": sys.version.split()[0],
        "packages": {name: versions.get(name) for name in PACKAGES},
        "seams": states,
        "names": names,
        "optional_seams": optional,
        "tested_with": verified_versions(),
    }


def _hook_is_active() -> bool:
    probe = "import sys; print(any(type(f).__name__ == '_SeamFinder' for f in sys.meta_path))"
    try:
        answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        print("a Python of this environment did not start within 60 s")
        return False
    return answer.stdout.strip() == "True"


def _lines(facts: Mapping[str, Any]) -> list[str]:
    """Format what was examined, a line each; of an installation without LLaMA-Factory the verdict alone."""
    if not facts["host_installed"]:
        return [facts["verdict"]]
    state, switch = "active" if facts["hook_active"] else "NOT active", facts["switch"]
    return [
        f"start-up hook   {state}  ({_bootstrap.ENV_SWITCH}: {'not set' if switch is None else switch})",
        f"start-up file   {_start_up_line(facts['start_up_file'])}",
        f"plugin          {facts['plugin']}  python {facts['python']}",
        *(f"{name:<15} {version or 'not installed'}" for name, version in facts["packages"].items()),
        *(f"seam            {state:<15} {target}" for target, state in facts["seams"].items()),
        f"names           {_names_line(facts['names'])}",
        *(f"optional seam   {state:<15} {target}" for target, state in facts["optional_seams"].items()),
        f"tested with     LLaMA-Factory {facts['tested_with']}",
        f"verdict         {facts['verdict']}",
    ]


def _verdict(hooked: bool, states: Mapping[str, str]) -> tuple[bool, str]:
    """Tell whether adaptive runs work here, with one line for the user: what to do where they do not."""
    bad = [target for target, state in states.items() if state != "fits"]
    if not _bootstrap.enabled():
        return False, f"switched off: `finetuning_type: adaptive` does not exist; unset {_bootstrap.ENV_SWITCH}"
    if bad:
        tested = verified_versions()
        return False, f"adaptive runs are refused: {first_of(bad)} does not fit; tested with LLaMA-Factory {tested}"
    if not hooked:
        return False, "llamafactory-cli lacks the hook: use `llamafactory-adaptive train`, or reinstall as a wheel"
    return True, "ready: adaptive runs work through llamafactory-cli and llamafactory-adaptive"


def _start_up_file() -> Path:
    return Path(sysconfig.get_path("purelib")) / HOOK_FILE


def _start_up_line(path: str | None) -> str:
    """Tell where the file is that brings the hook, what it costs, and how it is switched off."""
    if path is None:
        return f"none in {_start_up_file().parent}: `llamafactory-adaptive train` needs none"
    return (
        f"{path}: imports one module in every Python of this environment, about a millisecond; "
        f"{_bootstrap.ENV_SWITCH}=0 switches it off"
    )


def _host_states() -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Check the seams, the names that are imported and the optional seams; nothing where the plugin is off."""
    if not _bootstrap.enabled():
        return {}, {}, {}
    _bootstrap.install()
    from llamafactory_adaptive.bridge.seams import seam_states
    from llamafactory_adaptive.bridge.upstream_names import name_states

    return seam_states(), name_states(), seam_states(optional=True)


def _names_line(states: Mapping[str, str]) -> str:
    """Tell in one line whether every name is there that this plugin imports from LLaMA-Factory."""
    missing = [f"{name} {state}" for name, state in states.items() if state != "fits"]
    count = len(states) - len(missing)
    found = f"{count} of {len(states)} that this plugin imports from LLaMA-Factory are there"
    return f"{found}; {first_of(missing)}" if missing else found
