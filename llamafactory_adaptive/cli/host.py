"""The check for LLaMA-Factory, and the start-up hook of commands that need it."""

from importlib.util import find_spec

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import SeamError


INSTALL_HOST = "pip install -c constraints/llamafactory-0.9.5.txt '.[llamafactory]' in a checkout of this plugin"


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
        raise SeamError(f"this command needs LLaMA-Factory, which is not installed: {INSTALL_HOST}")
    _bootstrap.install()
