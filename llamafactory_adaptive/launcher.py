"""What a launcher (torchrun, accelerate, deepspeed) told this process. Known before any process group exists.

Standard library only, so that it can be asked before torch is imported.
"""

import os


def is_worker() -> bool:
    """Tell whether a launcher started this process as one of several.

    Clusters (Kubeflow's PyTorchJob, SageMaker) set RANK and WORLD_SIZE for their nodes, where torchrun is still to be
    started; LOCAL_RANK is the launcher's alone.
    """
    return os.environ.get("LOCAL_RANK", "-1") != "-1"  # older launchers' word for none


def launched_number() -> int:
    """This process's rank."""
    return int(os.environ.get("RANK", "0")) if is_worker() else 0


def launched_processes() -> int:
    """How many processes the launcher starts for this job."""
    return int(os.environ.get("WORLD_SIZE", "1")) if is_worker() else 1


def local_rank() -> int:
    """This process's place on its node."""
    number = os.environ.get("LOCAL_RANK", "0")
    return int(number) if number.isdecimal() else 0  # no number: told with the other settings
