"""What an adaptive run adds to a checkpoint: its plan, its layout, and the digests of all its files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.engines.distributed import from_main, wait_for_all
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE, write_digests
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.training.checkpoint_files import damage, is_sealed, unseal, write_layout
from llamafactory_adaptive.training.run_part import RunPart


class CheckpointRecord(RunPart):
    """Writer of plan and layout into checkpoints, which a resume checks. The last part to save.

    Args:
        current_plan: returns the plan with the ranks now in use.
        layout: how weights are spread over processes; None to write no layout.
    """

    def __init__(self, current_plan: Callable[[], RankPlan], layout: Mapping[str, Any] | None) -> None:
        self.current_plan, self.layout = current_plan, layout

    def save(self, folder: Path, args: Any, state: Any) -> None:
        """Write plan and layout into a checkpoint."""
        if args.should_save:
            self.current_plan().save(folder / PLAN_FILE)
            if self.layout is not None:
                write_layout(folder, self.layout)


def begin_checkpoint(folder: Path, args: Any) -> None:
    """Remove what marks an older checkpoint of that name as complete, before it is written over."""
    if args.should_save:
        unseal(folder)


def seal(folder: Path, args: Any) -> None:
    """Write the digests of a checkpoint, once every process has written its files into it."""
    wait_for_all(f"the end of saving {folder.name}")
    if args.should_save and folder.is_dir() and not is_sealed(folder):
        write_digests(folder)


def check_best(folder: Path) -> None:
    """Raise an error if the best checkpoint, which is about to be loaded, is damaged.

    Raises:
        PlanError: the checkpoint is damaged; raised on every process.
    """
    fault = from_main(f"the check of {folder.name}", lambda: damage(folder))
    if fault:
        raise PlanError(
            f"{folder}, the best checkpoint, is damaged: {fault}; run the same command with "
            "load_best_model_at_end: false, which resumes from the newest checkpoint"
        )
