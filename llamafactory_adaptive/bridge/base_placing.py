"""The devices of a process of its own: which ones it sees, and how the base is spread over them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamafactory_adaptive.bridge.base_loading import with_arguments
from llamafactory_adaptive.bridge.host_loading import Host
from llamafactory_adaptive.config.placement import ONE_DEVICE, Placement, parse_max_memory
from llamafactory_adaptive.errors import CalibrationError, refuse


def visible_devices(placement: Placement) -> str | None:
    """Return the devices that a process of its own sees, as ``CUDA_VISIBLE_DEVICES`` has them; None for the first."""
    if placement.device_map == ONE_DEVICE:
        return None
    import torch

    everything = ",".join(map(str, range(torch.cuda.device_count())))
    return os.environ.get("CUDA_VISIBLE_DEVICES", everything)


@contextmanager
def placed_base(placement: Placement, host: Host) -> Iterator[Any]:
    """Yield the base for inference, on the devices that the placement names; offloaded weights go after the context.

    Raises:
        AdaptiveError: the base cannot be loaded, or nothing can be written to the folder for offloaded weights.
    """
    if placement.device_map == ONE_DEVICE:
        yield host.load_base()
        return
    with _scratch(placement.offload_folder) as folder:
        with with_arguments(_arguments(placement, folder)):
            model = host.load_base()
        _refuse_model_without_device(model, placement)
        yield model


def _arguments(placement: Placement, folder: str) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that have accelerate spread a model."""
    most = {} if placement.max_memory is None else {"max_memory": parse_max_memory(placement.max_memory)}
    return {"device_map": placement.device_map, "offload_folder": folder, **most}


def _refuse_model_without_device(model: Any, placement: Placement) -> None:
    """Refuse a base all of which lies on disk: no device has room for its largest layer, and nothing can compute.

    Raises:
        CalibrationError: that is so; the message says what to raise.
    """
    if getattr(model, "_hf_hook", None) is None and any(p.device.type == "meta" for p in model.parameters()):
        most = placement.max_memory or "all that is free"
        raise CalibrationError(
            f"no device has room for a layer of the base within {most}: raise adaptive_calibration_max_memory, or use "
            "a machine with more memory"
        )


@contextmanager
def _scratch(parent: str | None) -> Iterator[str]:
    try:
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(prefix="adaptive-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        key = "adaptive_calibration_offload_folder"
        refuse(key, parent, f"nothing can be written there ({error})", "a folder of your own", cause=error)
    with scratch as folder:
        yield folder
