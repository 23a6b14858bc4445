"""Writing of safetensors files one tensor at a time.

``safetensors.torch.save_file`` needs all tensors of a file in memory, which for a checkpoint in one file is a copy of
the base. The format is a length (8 bytes, little endian), a JSON header with type, shape and place of each tensor, and
the tensors one after the other: https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Header entry of one tensor in a file: its name, type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Return the size of the tensor on disk, in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def read_specs(path: Path) -> list[TensorSpec]:
    """Read the header of a file, sorted by name.

    Raises:
        ValueError: a tensor has a type (8-bit float, for example) that 16-bit and 32-bit models do not use.
    """
    specs = []
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            specs.append(read_spec(file, name))
    return specs


def read_spec(file: Any, name: str) -> TensorSpec:
    """Read type and shape of one tensor of an open file, without its values.

    Raises:
        ValueError: as for :func:`read_specs`.
    """
    piece = file.get_slice(name)
    if piece.get_dtype() not in DTYPES:
        raise ValueError(f"{name} is held as {piece.get_dtype()}")
    return TensorSpec(name, DTYPES[piece.get_dtype()], tuple(piece.get_shape()))


def write_streaming(path: Path, specs: Iterable[TensorSpec], make: Callable[[TensorSpec], Tensor]) -> None:
    """Write a file whose tensors are made one by one; no more than one of them is in memory at a time.

    Wider types come first, as the safetensors library orders them, so that every tensor is aligned.
    """
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    with path.open("wb") as file:
        _write_header(file, ordered)
        for spec in ordered:
            _write_tensor(file, spec, make(spec))  # no name here, that would keep it while the next one is made


def _write_tensor(file: BinaryIO, spec: TensorSpec, tensor: Tensor) -> None:
    assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
    tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)


def _write_header(file: BinaryIO, specs: list[TensorSpec]) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, offset + spec.bytes]
        }  # fmt: skip
        offset += spec.bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)
