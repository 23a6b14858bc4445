"""Where the base model is measured: in which process, and on which devices. Standard library only."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llamafactory_adaptive.errors import Problem


ONE_DEVICE = "single"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SHARE = re.compile(r"(cpu|\d+)\s*=\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class Placement:
    """The process and the devices that a base is measured on, which change no statistic.

    Attributes:
        process: ``own`` for a process of its own; ``auto`` for the training process where that is safe.
        device_map: how a process of its own spreads the base, in accelerate's words; ``single`` for one device.
        max_memory: bytes by device (a number or ``cpu``), as :func:`parse_max_memory` reads them; None for all.
        offload_folder: folder for weights that fit into no memory; None for a scratch folder.
    """

    process: str = "auto"
    device_map: str = "auto"
    max_memory: str | None = None
    offload_folder: str | None = None

    @classmethod
    def from_checked(cls, common: Mapping[str, Any]) -> "Placement":
        """Build the placement from the checked keys that hold for every method."""
        prefix = "adaptive_calibration_"
        return cls(**{entry.name: common[prefix + entry.name] for entry in fields(cls)})

    @property
    def asks_for_own_process(self) -> bool:
        """Tell whether a key asks for something that only a process of its own can do."""
        return self.process == "own" or (self.device_map, self.max_memory, self.offload_folder) != ("auto", None, None)


def parse_max_memory(text: str) -> dict[int | str, int]:
    """Convert ``0=20GiB,cpu=60GiB`` to bytes by device.

    Raises:
        ValueError: a part is no such pair, or a device is named twice.
    """
    shares: dict[int | str, int] = {}
    for part in text.split(","):
        if not (found := _SHARE.fullmatch(part.strip())):
            raise ValueError(part)
        name, size, unit = found.groups()
        device: int | str = name.lower() if name.lower() == "cpu" else int(name)
        if device in shares:
            raise ValueError(part)
        shares[device] = int(float(size) * _UNITS[unit.upper()])
    return shares


def check_placement(common: Mapping[str, Any]) -> list[Problem]:
    """Find what is wrong with the devices that a base is to be spread over."""
    key, problems = "adaptive_calibration_max_memory", []
    text, device_map = common[key], common["adaptive_calibration_device_map"]
    if text is None:
        return []
    try:
        parse_max_memory(text)
    except ValueError as error:
        reason = f"{str(error).strip() or 'an empty part'!r} is no device and size: a number or cpu, then KiB to TiB"
        problems.append(Problem(key, text, reason, f"{key}: 0=20GiB,cpu=60GiB"))
    if device_map == ONE_DEVICE:
        reason = f"adaptive_calibration_device_map: {ONE_DEVICE} spreads nothing"
        problems.append(Problem(key, text, reason, "adaptive_calibration_device_map: auto"))
    return problems
