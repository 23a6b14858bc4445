"""``llamafactory-adaptive doctor``: versions, the start-up hook, whether each seam fits, and a verdict."""

import argparse
import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from llamafactory_adaptive import __version__, _bootstrap
from llamafactory_adaptive.cli.host import INSTALL_HOST, host_is_installed
from llamafactory_adaptive.errors import first_of
from llamafactory_adaptive.versions import installed_versions, verified_versions


HOOK_FILE = "llamafactory_adaptive_hook.pth"
PACKAGES = ("llamafactory", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def doctor(arguments: argparse.Namespace) -> int:
    """Check the installation; return 0 where adaptive runs will work through ``llamafactory-cli``, else 2.

    Where LLaMA-Factory is not installed, only that is printed and 0 returned: the Python API works.
    """
    if not host_is_installed():
        print(
            f"plugin {__version__}: the Python API is ready (from llamafactory_adaptive import ...); LLaMA-Factory is "
            f"not installed, so `finetuning_type: adaptive` does not exist here; to have it: {INSTALL_HOST}"
        )
        return 0
    probe = "import sys; print(any(type(f).__name__ == '_SeamFinder' for f in sys.meta_path))"
    try:
        answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False, timeout=60)
        hooked = answer.stdout.strip() == "True"
    except subprocess.TimeoutExpired:
        print("a Python of this environment did not start within 60 s")
        hooked = False
    switch = os.environ.get(_bootstrap.ENV_SWITCH, "not set")
    print(f"start-up hook   {'active' if hooked else 'NOT active'}  ({_bootstrap.ENV_SWITCH}: {switch})")
    print(f"start-up file   {_start_up_file()}")
    print(f"plugin          {__version__}  python {sys.version.split()[0]}")
    versions = installed_versions(PACKAGES)
    for name in PACKAGES:
        print(f"{name:<15} {versions.get(name, 'not installed')}")
    states, names, optional = _host_states()
    for target, state in states.items():
        print(f"seam            {state:<15} {target}")
    print(f"names           {_names_line(names)}")
    for target, state in optional.items():
        print(f"optional seam   {state:<15} {target}")
    print(f"tested with     LLaMA-Factory {verified_versions()}")
    ready, words = _verdict(hooked, {**states, **names})
    print(f"verdict         {words}")
    return 0 if ready else 2


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


def _start_up_file() -> str:
    """Tell where the file is that brings the hook, what it costs, and how it is switched off."""
    path = Path(sysconfig.get_path("purelib")) / HOOK_FILE
    if not path.is_file():
        return f"none in {path.parent}: `llamafactory-adaptive train` needs none"
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
