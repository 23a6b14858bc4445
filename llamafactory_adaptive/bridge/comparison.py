"""A comparison on LLaMA-Factory: settings are checked first, rows split once, and each run has its own process."""

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG
from llamafactory_adaptive.bridge.arguments import Args, our_keys
from llamafactory_adaptive.bridge.child import Children
from llamafactory_adaptive.bridge.comparison_checks import (
    check_arm,
    comparison_problems,
    warmup_problems,
    without_training_set,
)
from llamafactory_adaptive.bridge.comparison_files import check_unchanged, known_model, named_files
from llamafactory_adaptive.bridge.comparison_jobs import RunJob, run_in_own_process
from llamafactory_adaptive.bridge.comparison_rows import (
    COUNTS,
    HELD_OUT,
    TRAIN,
    SplitJob,
    answer_tokens,
    rows_folder,
    rows_identity,
)
from llamafactory_adaptive.bridge.comparison_time import RunTime, estimate
from llamafactory_adaptive.comparison.arms import PLAIN, Arm, run_settings
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.comparison.ledger import LEDGER, Ledger
from llamafactory_adaptive.comparison.results import arm_results, document
from llamafactory_adaptive.comparison.runner import Runner
from llamafactory_adaptive.comparison.secrets import without_secrets
from llamafactory_adaptive.errors import refuse_all
from llamafactory_adaptive.files import digest_of, read_json
from llamafactory_adaptive.versions import installed_versions


ROWS, RUNS, LOGS = "rows", "runs", "logs"
_PROBED_STEPS = 4
_VERSIONS = ("llamafactory-adaptive", "llamafactory", "torch", "transformers", "peft")
Say = Callable[[str], None]


def holds_adapter(folder: Path) -> bool:
    """Tell whether an adapter is in a folder."""
    return (folder / ADAPTER_CONFIG).is_file()


class Comparison:
    """The arms of a comparison as runs of LLaMA-Factory.

    Args:
        given: settings of the YAML.
        arms: ways to fine-tune.
        design: what they have in common.
        folder: receives rows, runs, logs and ledger; locked for this process before :meth:`run`.
        held_out: number of held-out rows at most.
        keep_adapters: whether adapters of runs that choose a rate are kept, too.
    """

    def __init__(
        self,
        given: Args,
        arms: Sequence[Arm],
        design: Design,
        folder: Path,
        held_out: int,
        keep_adapters: bool = False,
    ) -> None:
        self.given, self.design, self.folder, self.held_out = given, design, folder, held_out
        self.arms, self.keep_adapters = {arm.name: arm for arm in arms}, keep_adapters
        self.own_keys, self.versions = our_keys(given), installed_versions(_VERSIONS)
        self.children = Children()
        self.rows, self._model = folder / ROWS, ""
        self._files: dict[str, dict[str, str]] = {}
        self.split: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}

    @cached_property
    def ledger(self) -> Ledger:
        """Read the ledger; when it is first needed, as other processes may write to it before the folder is locked."""
        return Ledger(self.folder / LEDGER)

    def check(self) -> None:
        """Check the settings of every arm as a run of its own would be checked.

        Raises:
            AdaptiveConfigError: a run of some arm would be refused; the message names the arm.
        """
        shortest = min(self.design.steps_for_rates or math.inf, self.asked_steps() or math.inf)
        warmup = [] if math.isinf(shortest) else warmup_problems(self.given, int(shortest))
        refuse_all(*comparison_problems(self.given), *warmup)
        for arm in self.arms.values():
            check_arm(arm, self.settings_of(arm.name), self.given)

    def settings_of(self, arm: str) -> Args:
        """Build the settings of a run of an arm that judges, at the first point of the grid."""
        return self.settings(self.design.final(arm, self.design.grid[0])[0])

    def settings(self, run: Run) -> Args:
        """Build the settings of a run, without the folders that it reads and writes."""
        arm = self.arms[run.arm]
        return without_training_set(run_settings(self.given, arm, run.point, run.seed, run.steps, self.own_keys))

    def prepare(self, say: Say, device: str | None = None) -> None:
        """Tokenise and split the rows, unless that was done with the same settings, data files and model."""
        known = rows_identity(self.given, self.held_out)
        self.rows = rows_folder(self.folder / ROWS, known)
        self._model = known_model(self.folder, self.given, known["model"], say)
        self._files = {name: named_files(self.settings_of(name)) for name in self.arms}
        for unfinished in self.rows.parent.glob(".*.tmp"):  # of a run that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        if not (self.rows / COUNTS).is_file():
            say("tokenising the rows and holding some of them out, in a process of its own")
            job = SplitJob(self.given, self.held_out, str(self.rows))
            run_in_own_process(job, device, self.folder / LOGS / "split.log", self.children)
        self.split = read_json(self.rows / COUNTS, "the split of the rows")
        say("{train} rows to train on; {dev} held-out rows choose rates, {test} others judge".format(**self.split))
        if (count := self.split["dev"] + self.split["test"]) < self.held_out:
            say(f"{count} rows are held out, not {self.held_out}: there are no more, or a fifth of those to train on")
        halves = read_json(self.rows / HELD_OUT, "the held-out rows")
        self.tokens = {half: np.array(answer_tokens(rows)) for half, rows in halves.items()}

    def run(
        self, devices: Sequence[str | None], say: Say, needs_adapter: Callable[[Run], bool] | None = None
    ) -> Progress:
        """Make all runs, and return what is known of each arm.

        Args:
            devices: one run at a time on each.
            say: tells the user how it goes.
            needs_adapter: tells of a finished run whether it is made again if its adapter is gone; None for no run.

        Raises:
            AdaptiveError: the rows cannot be split, or plain LoRA cannot be trained.
        """
        self.prepare(say, devices[0])

        def known(run: Run) -> Mapping[str, Any] | None:
            held = self.known(run)
            if needs_adapter is None or held is None or not self._lacks_adapter(run, held):
                return held
            return None if needs_adapter(run) else held

        progress = Progress(self.design, list(self.arms.values()), known, self.figure)
        left, plain = progress.left(), None
        if again := sum(known(run) is None and self.known(run) is not None for run in left):
            say(f"runs made again, as their adapters are not there and have yet to answer: {again}")
        if left:
            plain = self.run_time(devices[0])
            time_left = estimate(self, plain, progress, devices)
            say(f"{len(left)} runs of about {self._steps_words()}{time_left}; logs in {self.folder / LOGS}")

        def length(run: Run) -> float:
            return 1.0 if plain is None else plain.seconds(self.steps(run))

        Runner(progress, self.ledger, self.train, self.key, devices, self.children.end, length).run()
        return progress

    def document(self, progress: Progress, effect: float, command: str, changed: Sequence[str]) -> dict[str, Any]:
        """Build the document of a finished comparison.

        Args:
            progress: what is known of each arm.
            effect: smallest difference that matters.
            command: the command, without secrets.
            changed: what was fixed at the first start and is another thing now, in words.
        """
        tokens = {half: counts.tolist() for half, counts in self.tokens.items()}
        facts = {
            "command": command,
            "versions": self.versions,
            "settings": without_secrets(self.given),
            "design": asdict(self.design),
            "changed": list(changed),
            "training_rows": self.split["train"],
        }
        return document(arm_results(progress), tokens, effect, facts)

    def figure(self, outcome: Mapping[str, Any], half: str) -> float:
        """Compute a run's mean loss over the answer tokens of one half of the held-out rows."""
        return float(np.average(outcome[half], weights=self.tokens[half]))

    def key(self, run: Run) -> Mapping[str, Any]:
        """Return everything that the result of a run depends on."""
        settings = without_secrets(self.settings(run))
        files = {"files": files} if (files := self._files.get(run.arm)) else {}  # most name none
        return {"settings": settings, "rows": self.split, "model": self._model, "versions": self.versions, **files}

    def known(self, run: Run) -> Mapping[str, Any] | None:
        """Return what came of a run, if the ledger holds it."""
        held: Mapping[str, Any] | None = self.ledger.get(self.key(run))
        return held

    def _lacks_adapter(self, run: Run, outcome: Mapping[str, Any]) -> bool:
        kept = "adapter" in outcome and holds_adapter(self.adapter_of(run, outcome))
        return outcome["status"] == "done" and not kept

    def train(self, run: Run, device: str | None) -> Mapping[str, Any]:
        """Make one run in a process of its own: training, then the losses of held-out rows."""
        output = self._output_of(run)
        check_unchanged(run.arm, self._files[run.arm], self.settings(run))
        outcome = self._run(run, output, device, self.folder / LOGS / f"{output.name}.log")
        if outcome["status"] == "done" and (self.keep_adapters or self.design.judges(run)):
            return outcome
        shutil.rmtree(output, ignore_errors=True)
        return {key: value for key, value in outcome.items() if key != "adapter"}

    def _output_of(self, run: Run) -> Path:
        return self.folder / RUNS / f"{run.arm}-{digest_of(self.key(run))[:12]}".replace(" ", "_")

    def adapter_of(self, run: Run, outcome: Mapping[str, Any]) -> Path:
        """Return the folder of the adapter that a run saved, also where the comparison's folder was moved."""
        output, saved = self._output_of(run), Path(outcome["adapter"])
        return output if saved.name == output.name else output / saved.name

    def _run(self, run: Run, output: Path, device: str | None, log: Path) -> dict[str, Any]:
        shutil.rmtree(output, ignore_errors=True)  # of a run that was killed
        folders = {"output_dir": str(output), "tokenized_path": str(self.rows / TRAIN)}
        job = RunJob({**self.settings(run), **folders}, str(self.rows / HELD_OUT), self._judged_at_once())
        return run_in_own_process(job, device, log, self.children)

    def _judged_at_once(self) -> int:
        sizes = (self.given.get(f"per_device_{kind}_batch_size") for kind in ("eval", "train"))
        return next((int(size) for size in sizes if size), 8)

    def run_time(self, device: str | None, arm: str = PLAIN) -> RunTime | None:
        """Measure a run of a few steps, for estimates of longer ones; None where it diverged.

        Raises:
            AdaptiveError: the run cannot be made.
        """
        probe = Run(arm, self.design.grid[0], 0, _PROBED_STEPS)
        key = {"probe": self.key(probe)}
        held = self.ledger.get(key)
        if held is None:
            output, began = self.folder / RUNS / "probe", time.perf_counter()
            held = self._run(probe, output, device, self.folder / LOGS / "probe.log")
            shutil.rmtree(output, ignore_errors=True)
            if held["status"] == "diverged":
                return None
            held = {
                **{name: held[name] for name in ("training_seconds", "steps")},
                "seconds": time.perf_counter() - began,
            }
            self.ledger.add(key, held)
        each = held["training_seconds"] / max(1, held["steps"])
        return RunTime(held["seconds"] - held["steps"] * each, each)

    def asked_steps(self) -> int | None:
        """Return the optimizer steps of a final run, where they do not depend on the number of rows."""
        steps = self.design.steps or int(self.given.get("max_steps") or -1)
        return steps if steps > 0 else None

    def _steps_words(self) -> str:
        shorter = self.design.steps_for_rates
        return f"{self.steps()} steps" + (f" ({shorter} where a rate is chosen)" if shorter else "")

    def steps(self, run: Run | None = None) -> int:
        """Estimate the optimizer steps of a run; of a final one without."""
        asked = None if run is None else run.steps
        if asked := asked or self.asked_steps():
            return asked
        batch = int(self.given.get("per_device_train_batch_size") or 8)
        batch *= int(self.given.get("gradient_accumulation_steps") or 1)
        rows: int = self.split["train"]
        return math.ceil(rows / batch * float(self.given.get("num_train_epochs") or 3.0))
