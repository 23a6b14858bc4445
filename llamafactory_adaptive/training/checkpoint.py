"""The state of a dynamic run inside a checkpoint: tensors as safetensors, the rest as JSON. Never pickle.

Processes that own pieces (ZeRO) each write their own file; the JSON says how many there are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch import distributed as dist

from llamafactory_adaptive.engines.distributed import world_size
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import STATE_JSON, replacing, write_atomically


STATE_SCHEMA = 2


def tensor_file(folder: Path, partitioned: bool) -> Path:
    """Return the path of this process's tensor file."""
    if not partitioned:
        return folder / "adaptive_state.safetensors"
    return folder / f"adaptive_state-{dist.get_rank() + 1:05d}-of-{world_size():05d}.safetensors"


def write_state(
    folder: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any], partitioned: bool, main: bool
) -> None:
    """Write this process's tensors if it owns pieces or is ``main``; a ``main`` process writes the JSON, too."""
    folder.mkdir(parents=True, exist_ok=True)
    if partitioned or main:
        with replacing(tensor_file(folder, partitioned)) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    if main:
        facts = {"schema_version": STATE_SCHEMA, "partitioned": partitioned, "processes": world_size()}
        write_atomically(folder / STATE_JSON, json.dumps({**facts, **document}) + "\n")


def read_state(folder: Path, partitioned: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read this process's tensors, and the JSON document.

    Raises:
        PlanError: files are missing, damaged, or were written by another number of processes that own pieces.
    """
    try:
        document = json.loads((folder / STATE_JSON).read_text(encoding="utf-8"))
        if document["schema_version"] != STATE_SCHEMA:
            raise PlanError(
                f"{folder} has state schema {document['schema_version']}; this version reads {STATE_SCHEMA}"
            )
        if document["partitioned"] != partitioned or (partitioned and document["processes"] != world_size()):
            kind = "pieces of the adapter" if document["partitioned"] else "the full adapter"
            raise PlanError(
                f"{folder} was written by {document['processes']} processes that each held {kind}; resume with "
                "the same DeepSpeed stage and number of processes"
            )
        return load_file(tensor_file(folder, partitioned)), document
    except PlanError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PlanError(
            f"{folder} has no complete adaptive state ({type(error).__name__}: {error}); resume from an earlier "
            "checkpoint"
        ) from error
