"""The environment variables of a launcher (torchrun, accelerate, deepspeed), set before any process group exists.

Standard library only, so that they can be read before torch is imported.
"""

import os


CPU = "cpu"  # in the place of a device's number, for runs that are to share the CPU


def is_worker() -> bool:
    """Tell whether a launcher started this process as one of several.

    Clusters (Kubeflow's PyTorchJob, SageMaker) set RANK and WORLD_SIZE for their nodes, where torchrun is still to be
    started; LOCAL_RANK is the launcher's alone.
    """
    return os.environ.get("LOCAL_RANK", "-1") != "-1"  # which older launchers set for none


def launched_number() -> int:
    """Return this process's rank in the job; 0 without a launcher."""
    return int(os.environ.get("RANK", "0")) if is_worker() else 0


def decides() -> bool:
    """Tell whether this process decides for its job: rank 0, or the first node's launcher before it starts any."""
    return launched_number() == 0 and os.environ.get("NODE_RANK", "0") == "0"


def launched_processes() -> int:
    """Return the number of processes that the launcher starts for this job; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_worker() else 1


def accelerate_starts(engine: str) -> bool:
    """Tell whether ``accelerate launch`` asks for an engine, ``DEEPSPEED`` or ``FSDP``, in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def local_rank() -> int:
    """Return this process's rank on its node; 0 where none is set."""
    number = os.environ.get("LOCAL_RANK", "0")
    return int(number) if number.isdecimal() else 0  # no number: reported with the other settings
