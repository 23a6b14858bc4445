"""Tasks of a comparison: the adapters of the runs that judge answer questions in vLLM, through the harness."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamafactory_adaptive.bridge.comparison import LOGS, Comparison, holds_adapter
from llamafactory_adaptive.bridge.comparison_jobs import run_in_own_process
from llamafactory_adaptive.bridge.harness import Harness, is_complete
from llamafactory_adaptive.bridge.merge_job import MergeJob
from llamafactory_adaptive.comparison.device_loop import DeviceLoop
from llamafactory_adaptive.comparison.experiment import Progress, Run
from llamafactory_adaptive.comparison.task_request import TaskRequest
from llamafactory_adaptive.comparison.task_results import task_document
from llamafactory_adaptive.comparison.task_scores import Answers
from llamafactory_adaptive.errors import EvaluationError
from llamafactory_adaptive.files import digest_of
from llamafactory_adaptive.reports.plaintext import tell


EVALUATIONS = "evaluations"
_TOKENIZER_FILE = "tokenizer_config.json"
# Settings whose adapters vLLM cannot serve beside a base.
_MERGED_ONLY = ("use_dora", "additional_target")
# The base is not asked; what was answered is kept row by row.
_FIXED = ("--no-base-row", "--log-samples")


@dataclass(frozen=True)
class Evaluation:
    """One adapter that is to answer: its arm and seed, its folder, and what its answers depend on."""

    arm: str
    seed: int
    adapter: Path
    key: Mapping[str, Any]

    @property
    def tokenizer(self) -> Path:
        """Return the folder of its tokenizer: that of the run where it was converted from what the run saved."""
        above = self.adapter.parent
        return above if (above / _TOKENIZER_FILE).is_file() else self.adapter


@dataclass(frozen=True)
class Batch:
    """Adapters of one arm that answer on one server, and how many of them have not answered yet."""

    adapters: Sequence[Evaluation]
    open: int

    @property
    def arm(self) -> str:
        """Return the name of their arm."""
        return self.adapters[0].arm

    @property
    def seeds(self) -> str:
        """Describe the seeds of its adapters."""
        return f"seed{'s' if len(self.adapters) > 1 else ''} {', '.join(str(each.seed) for each in self.adapters)}"


class TaskEvaluations:
    """The evaluations of a comparison: checked before its first run, made after its last one.

    Args:
        comparison: the comparison; its ledger holds what was answered, too.
        request: what is asked.
        device: the device of the first server, as ``CUDA_VISIBLE_DEVICES`` names it.

    Raises:
        EvaluationError: the harness could not make these evaluations.
    """

    def __init__(self, comparison: Comparison, request: TaskRequest, device: str | None) -> None:
        self.comparison, self.request = comparison, request
        token = comparison.given.get("hf_hub_token")
        secrets = {"HF_TOKEN": str(token)} if token else {}
        self.harness = Harness(request.python, comparison.children, secrets)
        named = str(comparison.given["model_name_or_path"])
        self.options = ("--base", os.path.abspath(named) if os.path.isdir(named) else named, *request.words)
        unused = comparison.folder / EVALUATIONS / "check"
        self.facts = self.harness.check([*self.options, "--out", str(unused)], device)
        self.failed: dict[str, str] = {}
        self.batches: list[Batch] = []

    @property
    def form(self) -> str:
        """Return how adapters are served, all alike: beside their base, or merged where that is not possible."""
        settings = (self.comparison.given, *(arm.settings for arm in self.comparison.arms.values()))
        merged = self.facts["on_cpu"] or any(each.get(key) for each in settings for key in _MERGED_ONLY)
        return "merged" if merged else "adapter"

    def words_before(self) -> str:
        """Describe what will be asked, for a user who is about to start."""
        asked = ", ".join(f"{name} ({facts['questions']} questions)" for name, facts in self.facts["tasks"].items())
        count = len(self.comparison.arms) * self.comparison.design.seeds
        how = {"adapter": "served beside their base", "merged": "each merged into its base, which takes longer"}
        return (
            f"then {count} adapters, {how[self.form]}, answer {asked}; how long that takes is told once the first of "
            "them have answered, and comes on top of the time of the runs"
        )

    def _asked(self) -> dict[str, Any]:
        """Return everything but the adapter that answers depend on."""
        asked = self.facts["settings"]
        facts = asked | {"models": [model.get("content") for model in asked["models"]]}
        return {"form": self.form, "questions": facts}

    def _key(self, run: Run) -> dict[str, Any]:
        """Return everything that the answers of a run's adapter depend on."""
        return {"run": digest_of(self.comparison.key(run)), **self._asked()}

    def has_to_answer(self, run: Run) -> bool:
        """Tell whether the adapter of a run has yet to answer, if its point is the best."""
        return self.comparison.design.judges(run) and self._key(run) not in self.comparison.ledger

    def _all(self, progress: Progress) -> Iterator[Evaluation]:
        for arm in progress.arms:
            choice, finals = progress.choice_if_known(arm.name), progress.finals(arm.name)
            best = None if choice is None else choice.best
            for run in [] if best is None else progress.design.final(arm.name, best):
                if run.seed in finals:
                    adapter = self.comparison.adapter_of(run, finals[run.seed])
                    yield Evaluation(arm.name, run.seed, adapter, self._key(run))

    def run(self, progress: Progress, devices: Sequence[str | None]) -> dict[str, Any]:
        """Make all evaluations that are due, and return what ``compare.json`` holds of tasks.

        Raises:
            EvaluationError: the adapters of plain LoRA cannot be evaluated.
        """
        self.batches = self._batches(progress)
        if self.batches:
            logs = self.comparison.folder / LOGS
            tell(f"{self._count()} adapters are left to answer {', '.join(self.request.tasks)}; logs in {logs}")
        DeviceLoop(self, devices, self.comparison.children.end).run()
        return self.document(progress)

    def _batches(self, progress: Progress) -> list[Batch]:
        """Group adapters that share a server: those of an arm, or each alone where they are merged."""
        by_server: dict[tuple[str, int], list[Evaluation]] = {}
        for each in self._all(progress):
            by_server.setdefault((each.arm, each.seed if self.form == "merged" else 0), []).append(each)
        return [batch for group in by_server.values() if (batch := self._batch(group)).open]

    def _batch(self, group: Sequence[Evaluation]) -> Batch:
        """Build a batch of the adapters that have not answered; or of a finished run that they are the last of.

        A kill between two lines of the ledger leaves such a run: its first adapters are there, and its last are not.
        """
        due = [each for each in group if each.key not in self.comparison.ledger]
        finished = (list(group[start:]) for start in range(len(group)) if is_complete(self._out(group[start:])))
        return Batch(next((batch for batch in finished if all(each in batch for each in due)), due), len(due))

    def _out(self, adapters: Sequence[Evaluation]) -> Path:
        """Return the folder in which these adapters answer."""
        name = f"{adapters[0].arm}-{digest_of([each.key for each in adapters])[:12]}".replace(" ", "_")
        return self.comparison.folder / EVALUATIONS / name

    def due(self) -> list[Batch]:
        """List the batches of which an adapter has not answered, without those of arms that are given up."""
        ledger = self.comparison.ledger
        return [
            batch
            for batch in self.batches
            if batch.arm not in self.failed and any(each.key not in ledger for each in batch.adapters)
        ]

    left = due

    def length(self, batch: Batch) -> float:
        """Return the number of adapters that were to answer."""
        return batch.open

    def words(self, batch: Batch, said: str) -> str:
        """Return what was said of a batch that has answered."""
        return said

    def words_left(self) -> str:
        """Tell the number of adapters that are left."""
        return f"{self._count()} adapters to go"

    def _count(self) -> int:
        return sum(batch.open for batch in self.due())

    def do(self, batch: Batch, device: str | None) -> str:
        """Ask the adapters of a batch on one server, keep what they answer, and describe it."""
        tell(f"{batch.arm} answers, {batch.seeds}")
        out = self._out(batch.adapters)
        if not is_complete(out):
            self._ask(batch.adapters, out, device)
        held, ledger = self.harness.values(out), self.comparison.ledger
        for each in (each for each in batch.adapters if each.key not in ledger):
            answers = held["answers"][_served_as(each)]
            ledger.add(each.key, {"answers": answers, "notes": held["warnings"] or []})
        return f"{batch.arm}: {self._means(batch.adapters)} ({batch.seeds})"

    def _ask(self, adapters: Sequence[Evaluation], out: Path, device: str | None) -> None:
        log, merged = self.comparison.folder / LOGS / f"eval-{out.name}.log", out.with_name(f"{out.name}-merged")
        try:
            models = [word for each in adapters for word in self._model(each, merged, device, log)]
            self.harness.run([*self.options, *models, *self._tokenizer(adapters[0]), *_FIXED], out, device, log)
        finally:  # as large as the base model
            shutil.rmtree(merged, ignore_errors=True)

    def _model(self, each: Evaluation, merged: Path, device: str | None, log: Path) -> tuple[str, str]:
        """Return the words that name an adapter to the harness, after a merge where it is to be merged."""
        if not holds_adapter(each.adapter):
            raise EvaluationError(f"the adapter of seed {each.seed} is no longer in {each.adapter}")
        if self.form == "adapter":
            return "--adapter", f"{_served_as(each)}={os.path.abspath(each.adapter)}"
        job = MergeJob(self.comparison.given, str(each.adapter), str(each.tokenizer), str(merged))
        run_in_own_process(job, device, log.with_suffix(".merge.log"), self.comparison.children)
        return "--merged", f"{_served_as(each)}={os.path.abspath(merged)}"

    def _tokenizer(self, each: Evaluation) -> list[str]:
        """Return the words that name the tokenizer of adapters that have none beside them."""
        if self.form == "merged" or each.tokenizer == each.adapter:
            return []
        return ["--base-tokenizer", os.path.abspath(each.tokenizer)]

    def _means(self, adapters: Sequence[Evaluation]) -> str:
        """Describe how adapters did, task by task."""
        held = [self.comparison.ledger.get(each.key)["answers"] for each in adapters]
        means = {task: np.mean([answers[task]["values"] for answers in held]) for task in self.request.tasks}
        return ", ".join(f"{task} {100 * mean:.1f} %" for task, mean in means.items())

    def document(self, progress: Progress) -> dict[str, Any]:
        """Build what ``compare.json`` holds of tasks, from the answers in the ledger."""
        answers: dict[str, dict[int, Any]] = {}
        notes: dict[str, None] = {}
        for each in self._all(progress):
            if (held := self.comparison.ledger.get(each.key)) is not None:
                values = {task: answered["values"] for task, answered in held["answers"].items()}
                answers.setdefault(each.arm, {})[each.seed] = values
                notes |= dict.fromkeys(f"{each.arm}: {note}" for note in held["notes"])
        tasks, asked = self.facts["tasks"], self.facts["settings"]
        facts = {
            "digest": digest_of(self._asked()),
            "protocol": asked["protocol"],
            "limit": asked["limit"],
            "form": self.form,
            "questions": {name: tasks[name]["questions"] for name in self.request.tasks},
            "commonest_answer": {name: tasks[name]["commonest_share"] for name in self.request.tasks},
            "metrics": {name: tasks[name]["metric"] for name in self.request.tasks},
            "task_versions": {name: tasks[name]["version"] for name in self.request.tasks},
            "versions": self.facts["versions"],
            "notes": [*self._reservations(progress), *notes],
        }
        by_arm = {arm: Answers.by_seed(values, self.request.tasks) for arm, values in answers.items()}
        return task_document(by_arm, self.failed, self.request.effect, self.harness.sign_flip(), facts)

    def _reservations(self, progress: Progress) -> Iterator[str]:
        asked = (each for each in self._all(progress) if each.arm not in self.failed)
        if left := sum(each.key not in self.comparison.ledger for each in asked):
            have = "adapters have" if left > 1 else "adapter has"
            yield f"{left} {have} not answered yet, so that figures and verdicts of tasks may change"
        if self.comparison.given.get("quantization_bit"):
            yield "adapters were trained on a quantised base and answered on the base as it is, in every arm alike"


def _served_as(each: Evaluation) -> str:
    return f"seed{each.seed}"
