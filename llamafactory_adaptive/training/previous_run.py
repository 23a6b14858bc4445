"""Files of a previous run in the output folder of a new one: moved aside, so that none are mixed up or lost."""

import os
from collections.abc import Iterable
from pathlib import Path

from llamafactory_adaptive.files import LOG_FILE, PLAN_FILE, PREVIOUS_FOLDER, cannot_write


# Records of a run, and what a run would resume from. The adapter itself stays until the host overwrites it.
_RECORDS = (
    "checkpoint-*",
    "adaptive_*",
    "trainer_state.json",
    "trainer_log.jsonl",
    "*_results.json",
    "training_*.png",
)


def set_previous_run_aside(output: Path, named: Iterable[Path] = ()) -> Path | None:
    """Move a previous run's records and checkpoints to a numbered folder, and return it; None if there was no run.

    A plan that the command ``plan`` wrote is no run, and stays.

    Args:
        output: the run's ``output_dir``.
        named: paths that the new run's settings name: these stay, and so do folders that hold them.

    Raises:
        OutputError: a file or folder cannot be moved.
    """
    checkpoints = output.glob(f"checkpoint-*/{PLAN_FILE}")
    if not (output / LOG_FILE).exists() and not any(checkpoints):
        return None
    kept = {path.resolve() for path in named}
    moving = {path for pattern in _RECORDS for path in output.glob(pattern) if not _holds(path, kept)}
    if not moving:
        return None
    above = output / PREVIOUS_FOLDER
    numbers = [int(path.name) for path in above.glob("*") if path.name.isdigit()]
    target = above / str(max(numbers, default=0) + 1)
    try:
        target.mkdir(parents=True)
        # The log goes last: a move that is cut short is finished by the next run.
        for path in sorted(moving, key=lambda path: (path.name == LOG_FILE, path.name)):
            os.replace(path, target / path.name)
    except OSError as error:
        raise cannot_write(target, error) from error
    return target


def _holds(path: Path, kept: set[Path]) -> bool:
    resolved = path.resolve()
    return any(resolved == other or resolved in other.parents for other in kept)
