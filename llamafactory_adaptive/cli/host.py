"""The check for LLaMA-Factory, and the start-up hook of commands that need it."""

from importlib.util import find_spec
from shlex import quote

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import SeamError
from llamafactory_adaptive.paths import checkout, shipped_file


_CONSTRAINTS = "constraints/llamafactory-0.9.5.txt"


def install_host() -> str:
    """Write the command that installs LLaMA-Factory, in versions that work together, for this installation."""
    if (folder := checkout()) is not None:
        return f"pip install -c {_CONSTRAINTS} '.[llamafactory]' in {folder}"
    try:
        pinned = f"-c {quote(str(shipped_file(_CONSTRAINTS)))} "
    except StopIteration:  # the package is on the path, but not installed
        pinned = ""
    return f"pip install {pinned}'llamafactory-adaptive[llamafactory]'"


def host_is_installed() -> bool:
    """Tell whether LLaMA-Factory is installed, without importing it."""
    try:
        return find_spec("llamafactory") is not None
    except ImportError:
        return False


def require_enabled() -> None:
    """Put the start-up hook in place in this process.

    Raises:
        SeamError: the user switched the plugin off, or LLaMA-Factory is not installed.
    """
    if not _bootstrap.enabled():
        raise SeamError("LLAMAFACTORY_ADAPTIVE=0 switches the plugin off; unset it")
    if not host_is_installed():
        raise SeamError(f"this command needs LLaMA-Factory, which is not installed: {install_host()}")
    _bootstrap.install()
