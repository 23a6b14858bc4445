"""A comparison on LLaMA-Factory: settings are checked first, rows split once, and each run has its own process."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory_adaptive.bridge.arguments import Args, our_keys
from llamafactory_adaptive.bridge.checked_run import checked_run
from llamafactory_adaptive.bridge.comparison_jobs import (
    HELD_OUT,
    TRAIN,
    RunJob,
    SplitJob,
    answer_tokens,
    run_in_own_process,
)
from llamafactory_adaptive.bridge.host_check import check_host_settings
from llamafactory_adaptive.comparison.arms import PLAIN, Arm, run_settings, without_secrets
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.comparison.ledger import Ledger
from llamafactory_adaptive.comparison.results import arm_results, document
from llamafactory_adaptive.comparison.runner import Runner, hours
from llamafactory_adaptive.errors import AdaptiveConfigError, Problem, refuse, refuse_all
from llamafactory_adaptive.files import digest_of, file_digest, read_json
from llamafactory_adaptive.versions import installed_versions


LEDGER, ROWS, RUNS, LOGS = "ledger.jsonl", "rows", "runs", "logs"
_PROBED_STEPS = 4
_VERSIONS = ("llamafactory-adaptive", "llamafactory", "torch", "transformers", "peft")


class Comparison:
    """The arms of a comparison as runs of LLaMA-Factory.

    Args:
        given: settings of the YAML.
        arms: ways to fine-tune.
        design: what they have in common.
        folder: receives rows, runs, logs and ledger.
        held_out: number of held-out rows.
    """

    def __init__(self, given: Args, arms: Sequence[Arm], design: Design, folder: Path, held_out: int) -> None:
        self.given, self.design, self.folder, self.held_out = given, design, folder, held_out
        self.arms = {arm.name: arm for arm in arms}
        self.own_keys = our_keys(given)
        self.ledger = Ledger(folder / LEDGER)
        self.split: dict[str, Any] = {}
        self.tokens: dict[str, Any] = {}

    def check(self) -> None:
        """Check the settings of every arm as a run of its own would be checked.

        Raises:
            AdaptiveConfigError: a run of some arm would be refused; the message names the arm.
        """
        refuse_all(*_comparison_problems(self.given))
        for arm in self.arms.values():
            try:
                self._check_arm(arm)
            except AdaptiveConfigError as error:
                raise AdaptiveConfigError(
                    [Problem(p.key, p.value, f"{p.allowed} (arm {arm.name})", p.suggestion) for p in error.problems]
                ) from error

    def _check_arm(self, arm: Arm) -> None:
        settings = {**self.settings(self.design.final(arm.name, self.design.grid[0])[0]), "output_dir": "x"}
        if settings["finetuning_type"] == "adaptive":
            checked_run(settings, host_too=False)
        elif stray := our_keys(settings):
            reason = "it has no effect on plain LoRA"
            refuse(stray[0], settings[stray[0]], reason, "adaptive_method=<a method> beside it")
        check_host_settings(settings)

    def settings(self, run: Run) -> Args:
        """Build the settings of a run, without the folders that it reads and writes."""
        return run_settings(self.given, self.arms[run.arm], run.point, run.seed, run.steps, self.own_keys)

    def prepare(self, log: Callable[[str], None]) -> None:
        """Tokenise and split the rows, unless a run of before has."""
        job = SplitJob(self.given, self.held_out, str(self.folder / ROWS))
        key = {"split": without_secrets(job.settings), "rows": job.rows}
        if not (self.folder / ROWS / HELD_OUT).is_file():
            self.ledger.forget(key)
        if key not in self.ledger:
            log(f"tokenising the rows and holding {self.held_out} of them out, in a process of its own")
        held = self.ledger.result(key, lambda: run_in_own_process(job, None, self.folder / LOGS / "split.log"))
        self.split = {**held, "held_out_sha256": file_digest(self.folder / ROWS / HELD_OUT)}
        halves = read_json(self.folder / ROWS / HELD_OUT, "the held-out rows")
        self.tokens = {half: np.array(answer_tokens(rows)) for half, rows in halves.items()}

    def run(self, devices: Sequence[str | None], say: Callable[[str], None]) -> Progress:
        """Make all runs, and return what is known of each arm.

        Raises:
            AdaptiveError: the rows cannot be split, or plain LoRA cannot be trained.
        """
        self.prepare(say)
        progress = Progress(self.design, list(self.arms.values()), self.known, self.figure)
        left = progress.runs_left()
        if left:
            say("training a few steps of plain LoRA to estimate the time")
            seconds = self.seconds_of_a_run(PLAIN, devices[0]) * left / len(devices)
            where = f" on {len(devices)} devices" if len(devices) > 1 else ""
            say(f"{left} runs of {self.steps()} steps, about {hours(seconds)}{where}; logs in {self.folder / LOGS}")
        Runner(progress, self.ledger, self.train, self.key, devices).run()
        return progress

    def document(self, progress: Progress, effect: float, command: str) -> dict[str, Any]:
        """Build the document of a finished comparison."""
        tokens = {half: counts.tolist() for half, counts in self.tokens.items()}
        facts = {
            "command": command,
            "versions": installed_versions(_VERSIONS),
            "settings": without_secrets(self.given),
            "design": {**asdict(self.design), "steps": self.steps()},
            "training_rows": self.split["train"],
        }
        return document(arm_results(progress), tokens, effect, facts)

    def figure(self, outcome: Mapping[str, Any], half: str) -> float:
        """Compute a run's mean loss over the answer tokens of one half of the held-out rows."""
        return float(np.average(outcome[half], weights=self.tokens[half]))

    def key(self, run: Run) -> Mapping[str, Any]:
        """Return everything that the result of a run depends on."""
        return {
            "settings": without_secrets(self.settings(run)),
            "rows": self.split,
            "versions": installed_versions(_VERSIONS),
        }

    def known(self, run: Run) -> Mapping[str, Any] | None:
        """Return what came of a run, if the ledger holds it."""
        held: Mapping[str, Any] | None = self.ledger.get(self.key(run))
        return held

    def train(self, run: Run, device: str | None) -> Mapping[str, Any]:
        """Make one run in a process of its own: training, then the losses of held-out rows."""
        name = f"{run.arm}-{digest_of(self.key(run))[:12]}".replace(" ", "_")
        settings = self._complete(self.settings(run), self.folder / RUNS / name)
        job = RunJob(settings, str(self.folder / ROWS / HELD_OUT), self._judged_at_once())
        return run_in_own_process(job, device, self.folder / LOGS / f"{name}.log")

    def _complete(self, settings: Args, output: Path) -> Args:
        folders = {"output_dir": str(output), "tokenized_path": str(self.folder / ROWS / TRAIN)}
        return {**settings, **folders}

    def _judged_at_once(self) -> int:
        sizes = (self.given.get(f"per_device_{kind}_batch_size") for kind in ("eval", "train"))
        return next((int(size) for size in sizes if size), 8)

    def seconds_of_a_run(self, arm: str, device: str | None) -> float:
        """Estimate the seconds of one run by training a few steps of an arm."""
        point = self.design.grid[0]
        probe = Run(arm, point, 0, _PROBED_STEPS)
        job = RunJob(self._complete(self.settings(probe), self.folder / RUNS / "probe"), None)
        key = {"probe": without_secrets(self.settings(probe)), "rows": self.split}
        held = self.ledger.result(key, lambda: run_in_own_process(job, device, self.folder / LOGS / "probe.log"))
        start = held["seconds"] - held["training_seconds"]
        return float(start + self.steps() * held["training_seconds"] / max(1, held["steps"]))

    def steps(self) -> int:
        """Return the optimizer steps of a final run."""
        steps: int = self.design.steps or int(self.given.get("max_steps") or -1)
        if steps > 0:
            return steps
        batch = int(self.given.get("per_device_train_batch_size") or 8)
        batch *= int(self.given.get("gradient_accumulation_steps") or 1)
        rows: int = self.split["train"]
        return math.ceil(rows / batch * float(self.given.get("num_train_epochs") or 3.0))


def _comparison_problems(given: Mapping[str, Any]) -> list[Problem]:
    """Find settings that a comparison cannot go with."""
    problems = []
    if given.get("stage", "sft") not in ("sft", "pt"):
        reason = "a comparison is by the loss of held-out answers, which stages sft and pt have"
        problems.append(Problem("stage", given.get("stage"), reason, "stage: sft"))
    for key in ("deepspeed", "fsdp"):
        if given.get(key):
            reason = "every run of a comparison has one process and one device"
            problems.append(Problem(key, given[key], reason, f"leaving {key} out, and quantization_bit: 4"))
    for key in ("packing", "neat_packing", "streaming"):
        if given.get(key):
            reason = "losses are compared row by row, and every arm trains on the same rows from the disk"
            problems.append(Problem(key, given[key], reason, f"{key}: false"))
    for key in ("tokenized_path", "adapter_name_or_path"):
        if given.get(key):
            problems.append(
                Problem(key, given[key], "a comparison starts from rows and the base", f"leaving {key} out")
            )
    return problems
