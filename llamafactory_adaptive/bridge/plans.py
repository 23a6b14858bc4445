"""One plan, one lock and the same settings for all processes of a job: rank 0 decides, the others are told."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from llamafactory_adaptive.bridge.arguments import adapter_to_go_on_with
from llamafactory_adaptive.bridge.checked_run import CheckedRun
from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun, longest_scoring
from llamafactory_adaptive.bridge.resuming import confirm_weights
from llamafactory_adaptive.engines.distributed import from_main, gather_facts, refuse_differences
from llamafactory_adaptive.files import digest_of
from llamafactory_adaptive.folder_lock import locked
from llamafactory_adaptive.launcher import launched_number, local_rank
from llamafactory_adaptive.planning.sources import PlanSource, obtain_plan
from llamafactory_adaptive.reports.plaintext import tell


@contextmanager
def lock_output_folder(folder: Path) -> Iterator[None]:
    """Lock ``output_dir`` for this run, on rank 0 of the job; where that fails every process stops.

    Raises:
        AdaptiveError: another run holds the lock, or the folder cannot be written.
    """
    with ExitStack() as stack:
        from_main(f"the lock of {folder}", lambda: stack.enter_context(locked(folder)))
        yield


def agreed_settings(check: Callable[[], CheckedRun]) -> CheckedRun:
    """Check the settings of this process, and that every process of the job has the same adaptive ones.

    Raises:
        AdaptiveError: settings of some process are invalid or differ; every process raises it.
    """
    run, everyone = gather_facts("the check of the settings", check, _compared)
    refuse_differences(everyone, "were given other adaptive settings than rank 0")
    return run


def _compared(run: CheckedRun) -> str:
    """Compute a digest of what must be equal; rank 0 alone reads the plan that is named, by a path on its node."""
    return digest_of({key: value for key, value in asdict(run.config).items() if key != "plan_path"})


def agreed_plan(run: CheckedRun, checkpoint: Path | None) -> PlanSource:
    """Find or build the plan of a run on rank 0 and send it to the others, which neither plan nor read a cache.

    Raises:
        AdaptiveError: there is no plan, or a node has other weights of the adapter that training goes on with; every
            process raises it before the model is loaded.
    """
    confirm_weights(adapter_to_go_on_with(run.args))
    if launched_number() != 0 and local_rank() == 0:
        tell("rank 0 of the job finds or computes the rank plan, and this node waits for it")
    sent = from_main(
        "the start of training with its rank plan",
        lambda: obtain_plan(run.config, LlamaFactoryRun(run, checkpoint)).to_json(),
        longest_scoring(run),
    )
    return PlanSource.from_json(sent)
