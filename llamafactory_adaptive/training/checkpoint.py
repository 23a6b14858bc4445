"""The state of a dynamic run inside a checkpoint: tensors as safetensors, the rest as JSON. Never pickle.

Tensors are whole, under every engine. In checkpoints of earlier versions each process that owned pieces (ZeRO) wrote a
file of its own, and the JSON says how many there are.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llamafactory_adaptive.engines.distributed import process_number, world_size
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import STATE_JSON, STATE_PIECE, STATE_TENSORS, replacing, write_atomically


STATE_SCHEMA = 2


def write_state(folder: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Write whole tensors, and beside them the JSON document."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / STATE_TENSORS) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    facts = {"schema_version": STATE_SCHEMA, "partitioned": False, "processes": world_size()}
    write_atomically(folder / STATE_JSON, json.dumps({**facts, **document}) + "\n")


def read_state(folder: Path, partitioned: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON document, whose ``partitioned`` tells whether these are this process's pieces.

    Args:
        folder: folder of the checkpoint.
        partitioned: whether this process owns pieces of the adapter.

    Raises:
        PlanError: files are missing or damaged, or an earlier version wrote pieces for other processes.
    """
    try:
        document = json.loads((folder / STATE_JSON).read_text(encoding="utf-8"))
        if document["schema_version"] != STATE_SCHEMA:
            raise PlanError(
                f"{folder} has state schema {document['schema_version']}; this version reads {STATE_SCHEMA}"
            )
        if document["partitioned"] and not (partitioned and document["processes"] == world_size()):
            raise PlanError(
                f"{folder} was written by an earlier version, by {document['processes']} processes that each held "
                "pieces of the adapter; resume with the same DeepSpeed stage and number of processes"
            )
        mine = STATE_PIECE.format(number=process_number() + 1, count=world_size())
        return load_file(folder / (mine if document["partitioned"] else STATE_TENSORS)), document
    except PlanError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise PlanError(
            f"{folder} has no complete adaptive state ({type(error).__name__}: {error}); resume from an earlier "
            "checkpoint"
        ) from error
