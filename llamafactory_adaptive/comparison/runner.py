"""The runs of a comparison as jobs of its loop: each end is written down, and what follows is due from then on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llamafactory_adaptive.comparison.device_loop import DeviceLoop
from llamafactory_adaptive.comparison.experiment import Progress, Run
from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.errors import DivergedError
from llamafactory_adaptive.reports.plaintext import tell


Train = Callable[[Run, str | None], Mapping[str, Any]]


class Runner:
    """Runs what is due on all devices, and tells how far it is.

    Args:
        progress: knows what is due.
        ledger: receives what came of each run.
        train: makes one run on one device; it raises an AdaptiveError where the run cannot be made at all.
        settings: returns everything that a run's result depends on, for the ledger.
        devices: devices as ``CUDA_VISIBLE_DEVICES`` names them; (None,) for the only one.
        end_runs: ends the runs that are under way.
        length: estimates how long a run takes against others, in any unit.
    """

    def __init__(
        self,
        progress: Progress,
        ledger: Ledger,
        train: Train,
        settings: Callable[[Run], Mapping[str, Any]],
        devices: Sequence[str | None] = (None,),
        end_runs: Callable[[], None] = lambda: None,
        length: Callable[[Run], float] = lambda run: 1.0,
    ) -> None:
        self.progress, self.ledger, self.train, self.settings = progress, ledger, train, settings
        self.devices, self.end_runs, self.length = devices, end_runs, length

    def run(self) -> None:
        """Make all runs that are due, until none is. Whatever ends this ends the runs that are under way, too.

        Raises:
            DivergedError: plain LoRA, which all others are compared with, diverges at every rate.
            AdaptiveError: plain LoRA cannot be run; the disk is full; a device is lost.
        """
        DeviceLoop(self, self.devices, self.end_runs).run()

    @property
    def failed(self) -> dict[str, str]:
        """Return why arms are given up, by name."""
        return self.progress.failed

    def due(self) -> list[Run]:
        """List the runs that can be made now, after a check of those that were made."""
        self._check()
        return self.progress.due()

    def _check(self) -> None:
        """Give up arms of another budget, and everything where there is nothing to compare with."""
        for arm, why in self.progress.give_up_larger_arms().items():
            tell(f"{arm} is given up: {why}")
        plain = self.progress.arms[0].name
        choice = self.progress.choice_if_known(plain)
        if choice is not None and choice.best is None:
            raise DivergedError(
                f"{plain} diverged at every point tried ({', '.join(map(str, choice.curve))}), so that there is "
                "nothing to compare with: give lower --rates, or a YAML with warmup_ratio or max_grad_norm"
            )

    def do(self, run: Run, device: str | None) -> Mapping[str, Any]:
        """Make a run, and write down what came of it."""
        outcome = self.train(run, device)
        self.ledger.add(self.settings(run), outcome)
        return outcome

    def words(self, run: Run, outcome: Mapping[str, Any]) -> str:
        """Describe what came of a run."""
        what = f"{run.arm} at {run.point}, seed {run.seed}"
        if outcome["status"] == "diverged":
            return f"{what}: diverged"
        return f"{what}: loss {self.progress.figure(outcome, 'dev'):.4f} on the rows that choose"

    def left(self) -> list[Run]:
        """List the runs that are left, as far as is known."""
        return self.progress.left()

    def words_left(self) -> str:
        """Tell the number of runs that are left."""
        return f"{len(self.left())} to go"
