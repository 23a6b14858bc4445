"""Start-up hook: arms the bridge when, and only when, a process imports LLaMA-Factory.

A ``.pth`` file in site-packages imports this module in every interpreter of the environment, torchrun and Ray workers
included. It therefore uses nothing but ``sys`` and ``os`` and does one thing: put a finder in front of
``sys.meta_path`` that watches for modules of ``llamafactory``. ``LLAMAFACTORY_ADAPTIVE=0`` keeps it out entirely.

Run as a script it is the torchrun entry of ``llamafactory-adaptive train``, for hosts without the ``.pth`` file.
"""

import os
import sys


TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself is too slow to import in every interpreter
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

ENV_SWITCH = "LLAMAFACTORY_ADAPTIVE"


class _SeamFinder:
    """Meta-path finder that lets the bridge act right after one of its seam modules has been executed."""

    def __init__(self) -> None:
        self._busy: set[str] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if not fullname.startswith("llamafactory.") or fullname in self._busy:
            return None

        from importlib.util import find_spec

        from llamafactory_adaptive import bridge

        if fullname not in bridge.seam_modules():
            return None

        self._busy.add(fullname)  # the look-up below comes back through this finder
        try:
            spec = find_spec(fullname)
        finally:
            self._busy.discard(fullname)

        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                execute(module)
                bridge.apply_seams(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def enabled() -> bool:
    """Tell whether the plugin is switched on: ``LLAMAFACTORY_ADAPTIVE`` is not set to 0, false, no or off."""
    return os.environ.get(ENV_SWITCH, "1").lower() not in ("0", "false", "no", "off")


def active() -> bool:
    """Tell whether the finder that watches for seam modules is in place in this interpreter."""
    return any(type(finder).__name__ == "_SeamFinder" for finder in sys.meta_path)


def install() -> None:
    """Put the finder that watches for seam modules in place, once; do nothing where the plugin is switched off."""
    if enabled() and not active():
        sys.meta_path.insert(0, _SeamFinder())


if __name__ == "__main__":
    sys.path.pop(0)  # the package's own folder: its modules must not shadow top-level ones
    from llamafactory_adaptive import _bootstrap

    _bootstrap.install()
    from llamafactory_adaptive import bridge

    bridge.train_worker()
else:
    install()
