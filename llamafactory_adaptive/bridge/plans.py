"""One plan and one lock for all processes of a job."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun, longest_scoring
from llamafactory_adaptive.engines.distributed import from_main, gather_facts, refuse_differences
from llamafactory_adaptive.files import digest_of
from llamafactory_adaptive.folder_lock import locked
from llamafactory_adaptive.planning.sources import PlanSource, obtain_plan
from llamafactory_adaptive.training.guard import PLANS_DIFFER


_STARTS_DIFFER = (
    "would start from other factors than rank 0 (nodes that compute for themselves can differ in the last bit): use a "
    "cache folder that all nodes share, or set adaptive_init: default"
)


@contextmanager
def lock_output_folder(folder: Path) -> Iterator[None]:
    """Lock ``output_dir`` for this run, on rank 0 of the job; where that fails every process stops.

    Raises:
        AdaptiveError: another run holds the lock, or the folder cannot be written.
    """
    with ExitStack() as stack:
        from_main(f"the lock of {folder}", lambda: stack.enter_context(locked(folder)))
        yield


def agreed_plan(run: CheckedRun, checkpoint: Path | None) -> PlanSource:
    """Build or find the plan of a run, and verify that every process of the job has the same.

    Raises:
        AdaptiveError: there is no plan, or the processes differ; every process raises it before the model is loaded.
    """
    asked = {key: value for key, value in asdict(run.config).items() if key != "plan_path"}
    source, everyone = gather_facts(
        "the start of training with its rank plan",
        lambda: obtain_plan(run.config, LlamaFactoryRun(run, checkpoint)),
        lambda obtained: (obtained.plan.digest(), digest_of(asked), obtained.start and obtained.start.digest),
        longest_scoring(run),
    )
    refuse_differences([plan for plan, _, _ in everyone], PLANS_DIFFER)
    refuse_differences([asked for _, asked, _ in everyone], "were given other adaptive settings than rank 0")
    refuse_differences([start for _, _, start in everyone], _STARTS_DIFFER)
    return source
