"""The start-up hook, armed for a command that needs LLaMA-Factory."""

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import SeamError


def require_enabled() -> None:
    """Arm the start-up hook in this process.

    Raises:
        SeamError: the user switched the plugin off.
    """
    if not _bootstrap.enabled():
        raise SeamError("LLAMAFACTORY_ADAPTIVE=0 switches the plugin off; unset it")
    _bootstrap.install()
