"""How the host's own load gets its base: spread over devices, or from a measurement that has loaded it already.

The host loads a base by ``from_pretrained`` of an auto class; a seam has it ask here (:func:`steerable`). Everything
that the host does before and after stays its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.errors import CalibrationError


if TYPE_CHECKING:
    from llamafactory_adaptive.bridge.host_loading import Host
    from llamafactory_adaptive.bridge.loaded_base import LoadedBase

# Gets the original function and its arguments by name, and returns the model.
Steer = Callable[[Callable[..., Any], dict[str, Any]], Any]
_steer: ContextVar[Steer | None] = ContextVar("adaptive_base_loading", default=None)


def steerable(auto_class: Any) -> Any:
    """Build an auto class whose ``from_pretrained`` goes through what :func:`steered` has set, if anything."""

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        def load(**arguments: Any) -> Any:
            return auto_class.from_pretrained.__func__(cls, *args, **arguments)

        steer = _steer.get()
        return load(**kwargs) if steer is None else steer(load, kwargs)

    # Of the same name: remote code is looked up by it.
    members = {"from_pretrained": classmethod(from_pretrained), "__module__": auto_class.__module__}
    return type(auto_class.__name__, (auto_class,), members)


@contextmanager
def steered(steer: Steer) -> Iterator[None]:
    """Pass the load of every base that the host loads within the context to ``steer``."""
    token = _steer.set(steer)
    try:
        yield
    finally:
        _steer.reset(token)


@contextmanager
def with_arguments(more: Mapping[str, Any]) -> Iterator[None]:
    """Add arguments of ``from_pretrained`` to those of the host within the context."""
    with steered(lambda load, arguments: load(**{**arguments, **more})):
        yield


class _Loaded(BaseException):
    """Ends the host's load once the base is there; no Exception, so that nobody takes it for a failure."""

    def __init__(self, base: "LoadedBase") -> None:
        self.base = base


class BaseHandover:
    """The base that the training process measures, kept for the host's own load, which so does not load it again.

    The host gets it where it asks for the same by the same arguments, and only if it is as after a fresh load.
    """

    def __init__(self) -> None:
        self._kept: LoadedBase | None = None

    @contextmanager
    def offered(self) -> Iterator[None]:
        """Measure runs of this context in this process, and have the host's load take the base from here."""
        token = handover.set(self)
        try:
            with steered(self._give):
                yield
        finally:
            handover.reset(token)
            self._kept = None

    @contextmanager
    def opened(self, host: "Host") -> Iterator[Any]:
        """Yield the base as the host loads it for training, on which nothing else has worked yet.

        Raises:
            CalibrationError: the host cannot load it, or not by an auto class of text models.
        """
        base, self._kept = self._kept or _load_for_training(host), None
        yield base.model
        if base.restore():
            self._kept = base

    def _give(self, load: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        from llamafactory_adaptive.bridge.loaded_base import described

        kept, self._kept = self._kept, None
        if kept is not None and kept.arguments == {name: described(value) for name, value in arguments.items()}:
            return kept.model
        del kept  # before another one is loaded
        return load(**arguments)


# Set while a run trains in this process, alone and without a launcher.
handover: ContextVar[BaseHandover | None] = ContextVar("adaptive_handover", default=None)


def _load_for_training(host: "Host") -> "LoadedBase":
    try:
        with steered(_stop):
            host.load_base(is_trainable=True)
    except _Loaded as loaded:
        return loaded.base
    raise CalibrationError(
        "LLaMA-Factory loads this model by other means than AutoModelForCausalLM; set "
        "adaptive_calibration_process: own"
    )


def _stop(load: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    from llamafactory_adaptive.bridge.loaded_base import LoadedBase, described
    from llamafactory_adaptive.bridge.random_state import RandomState

    asked = {name: described(value) for name, value in arguments.items()}
    before = RandomState.current()
    model = load(**arguments)
    raise _Loaded(LoadedBase(model, asked, drew=not before.is_current()))
