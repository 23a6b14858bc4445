"""Checks of checkpoints: digests of all files, and the layout of processes that wrote them.

A checkpoint is sealed with digests when every process has written its files: later changes are detected. One without
digests (of an older version, or of a run killed just before they were written) is valid if its files are there and
readable.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llamafactory_adaptive.errors import PlanError, first_of
from llamafactory_adaptive.files import (
    COMPLETE,
    DIGESTS_FILE,
    PLAN_FILE,
    STATE_JSON,
    STATE_PIECE,
    STATE_TENSORS,
    damaged_files,
    read_mapping,
    write_atomically,
)


LAYOUT_FILE = "adaptive_layout.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def is_sealed(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has digests, which are written once it is complete."""
    return (checkpoint / DIGESTS_FILE).exists()


def unseal(checkpoint: Path) -> None:
    """Remove what marks a checkpoint as complete, before it is written over."""
    for name in (DIGESTS_FILE, *COMPLETE):
        (checkpoint / name).unlink(missing_ok=True)


def damage(checkpoint: Path) -> str:
    """Describe what is wrong with a checkpoint, by file; empty if it can be resumed from."""
    try:
        faults = damaged_files(checkpoint) if is_sealed(checkpoint) else _unreadable(checkpoint)
        faults = faults or _not_finite(checkpoint)
    except (PlanError, OSError, SafetensorError) as error:
        faults = [str(error)]
    return first_of(faults)


def _not_finite(checkpoint: Path) -> list[str]:
    """Find an adapter file that holds NaN or infinity, as a diverged run saves; empty if there is none."""
    for name in (name for name in ADAPTER_FILES if name.endswith(".safetensors") and (checkpoint / name).is_file()):
        with safe_open(checkpoint / name, framework="pt") as file:
            if not all(bool(torch.isfinite(file.get_tensor(key)).all()) for key in file.keys()):  # noqa: SIM118
                return [f"{name} holds NaN or infinity: training had diverged"]
    return []


def _unreadable(checkpoint: Path) -> list[str]:
    """List the missing and unreadable files of a checkpoint without digests."""
    if missing := [name for name in COMPLETE if not (checkpoint / name).is_file()]:
        return [f"{name} is missing" for name in missing]
    needed = _needed(checkpoint)
    faults = [f"{name} is missing" for name in needed if not (checkpoint / name).exists()]
    there = {name for name in needed if (checkpoint / name).is_file()} | {
        path.name for path in checkpoint.iterdir() if path.suffix in (".json", ".safetensors", ".pt", ".pth", ".bin")
    }
    return faults + [fault for name in sorted(there) if (fault := _fault_of(checkpoint / name))]


def _needed(checkpoint: Path) -> list[str]:
    names = [*COMPLETE, *ADAPTER_FILES]
    # A run told to save the model only keeps nothing of the optimizer.
    if (checkpoint / "scheduler.pt").exists() or any(checkpoint.glob("rng_state*.pth")):
        names += [] if (checkpoint / "latest").exists() else ["optimizer.pt"]
    if (checkpoint / "latest").is_file():  # DeepSpeed's: names the folder of its pieces
        names.append((checkpoint / "latest").read_text(encoding="utf-8", errors="replace").strip() or "latest")
    if _trains_components(checkpoint):
        names += _state_files(checkpoint)
    return names


def _trains_components(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is of a run with a state of its own; a plan that was given tells of another search."""
    facts = read_mapping(checkpoint / PLAN_FILE, PLAN_FILE).get("provenance")
    if not isinstance(facts, dict):
        return False
    return "second_stage" in facts or ("course" in facts and not facts.get("adaptive_plan"))


def _state_files(checkpoint: Path) -> list[str]:
    if not (checkpoint / STATE_JSON).is_file():
        return [STATE_JSON]
    state = read_mapping(checkpoint / STATE_JSON, STATE_JSON)
    if not state.get("partitioned"):
        return [STATE_JSON, STATE_TENSORS]
    count = int(state.get("processes", 0))
    return [STATE_JSON, *(STATE_PIECE.format(number=rank + 1, count=count) for rank in range(count))]


def _fault_of(path: Path) -> str:
    try:
        if path.suffix == ".json":
            read_mapping(path, path.name, finite=False)  # a history may hold a loss that is not a number
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):  # compares the header with the file's size
                pass
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    except PlanError as error:
        return str(error)
    except (OSError, SafetensorError) as error:
        return f"{path.name} is damaged ({error})"
    return ""


# -- layout -----------------------------------------------------------------------------------------------------------


def write_layout(checkpoint: Path, layout: Mapping[str, Any]) -> None:
    """Write into a checkpoint how weights and optimizer states were spread over processes."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    write_atomically(checkpoint / LAYOUT_FILE, json.dumps({"schema_version": 1, **layout}, indent=1) + "\n")


def check_layout(checkpoint: Path, here: Mapping[str, Any]) -> str:
    """Raise an error if the host could not read a checkpoint's optimizer state under the layout of this run.

    DeepSpeed does not always detect this: shards of one stage, read as those of another, give silently wrong training.
    Without DeepSpeed and FSDP 2 everything is whole, and any number of processes reads it.

    Args:
        checkpoint: folder of the checkpoint; one of an older version holds no layout, and passes.
        here: ``deepspeed_stage`` (None without DeepSpeed), ``round_robin_gradients``, ``fsdp_version`` (0
            without FSDP), ``processes``, ``global_batch`` (rows of an optimizer step). Older versions did not record
            the version and the rows.

    Returns:
        A warning about a difference that is allowed; empty if there is none.

    Raises:
        PlanError: the layouts differ; the message names each difference, and why it cannot be.
    """
    if not (checkpoint / LAYOUT_FILE).exists():
        return ""
    there = read_mapping(checkpoint / LAYOUT_FILE, str(checkpoint / LAYOUT_FILE))
    there = {"fsdp_version": here.get("fsdp_version"), **there}  # which earlier versions did not record
    faults = {key: f"{key} is {there.get(key)} there and {value} here" for key, value in here.items()
              if key != "global_batch" and there.get(key) != value}  # fmt: skip
    divided = here["deepspeed_stage"] or here.get("fsdp_version") == 2
    if faults and (divided or set(faults) != {"processes"}):
        raise PlanError(
            f"{checkpoint} was written under another layout: {'; '.join(faults.values())}; "
            f"{_why_refused(there, here)}; set deepspeed, FSDP and processes back, or use another output_dir"
        )
    return _advice(checkpoint.name, there, here)


def _why_refused(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if there.get("fsdp_version") != here.get("fsdp_version"):
        return "the Trainer reads the optimizer state of one version of FSDP, or of none, under that alone"
    if here.get("fsdp_version") == 2:
        return "the Trainer cannot load a checkpoint of FSDP 2 with another number of processes than wrote it"
    if there.get("deepspeed_stage") is None:
        return "DeepSpeed cannot read the optimizer state that the Trainer writes without it"
    if here["deepspeed_stage"] is None:
        return "without DeepSpeed the Trainer cannot read the optimizer state that DeepSpeed wrote"
    return "DeepSpeed reads its optimizer state only under the ZeRO stage and the number of processes that wrote it"


def _advice(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describe what another number of processes or another global batch means; empty where both are the same."""
    before, now = there.get("global_batch"), here.get("global_batch")
    if None not in (before, now) and before != now:
        return (
            f"{name} was written with a global batch of {before}, and this run has one of {now}: it goes on, but its "
            "steps and ranks will not be those that it would have had; set gradient_accumulation_steps or "
            f"per_device_train_batch_size so that all processes together take {before} rows a step"
        )
    if there.get("processes") == here["processes"]:
        return ""
    batch = "if the global batch is the same" if before is None else f"as the global batch is still {before}"
    return (
        f"{name} was written by {there.get('processes')} processes and goes on with {here['processes']}: ranks stay "
        f"the same, and weights up to rounding, {batch}"
    )
