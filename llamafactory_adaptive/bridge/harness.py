"""The evaluation harness (``eval/``), run by its commands in the environment that has vLLM."""

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.child import Children, alone, answer_of_child, last_words, run_child
from llamafactory_adaptive.comparison.task_request import in_our_words
from llamafactory_adaptive.comparison.task_scores import SignFlip
from llamafactory_adaptive.errors import EvaluationError
from llamafactory_adaptive.files import read_mapping
from llamafactory_adaptive.paths import shipped_folder


_ANSWER_SECONDS = 1800.0  # for a check, which may fetch rows and import vLLM; and for reading answers
_GRACE_SECONDS = 45  # that the harness has to end its server
_IN_USE_SECONDS = 90.0  # that an earlier run of the harness, whose command was killed, has to end
_SAID = "eval: error: "
_STATE_FILE = "eval_run.json"


class Harness:
    """The harness's commands.

    Args:
        python: interpreter of its environment.
        children: through which another thread may end its processes.
        secrets: environment variables besides those of this process.
    """

    def __init__(self, python: Path, children: Children, secrets: Mapping[str, str]) -> None:
        self.python, self.children, self.secrets = python, children, secrets

    @cached_property
    def folder(self) -> Path:
        """Find the folder of the harness's modules.

        Raises:
            EvaluationError: this installation lacks it.
        """
        try:
            return shipped_folder("eval")
        except StopIteration as error:
            raise EvaluationError(
                "the evaluation harness is not in this installation; install llamafactory-adaptive again, or run the "
                "command in a checkout"
            ) from error

    def environment(self, device: str | None) -> dict[str, str]:
        """Return the environment of a process: the harness's own modules, one device, none of our packages."""
        ours = {**alone(device), **self.secrets}
        return {**ours, "PYTHONPATH": str(self.folder.parent), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}

    def check(self, words: Sequence[str], device: str | None) -> dict[str, Any]:
        """Check an evaluation before its adapters exist, and return the facts about it.

        Args:
            words: options of ``eval.run`` without adapters.
            device: the device that the server would have.

        Raises:
            EvaluationError: options or rows are wrong, or the environment cannot serve models.
        """
        return self._answer("eval.check", words, device)

    def values(self, folder: Path) -> dict[str, Any]:
        """Read how the models of a finished run did on every question.

        Raises:
            EvaluationError: the folder cannot be read.
        """
        return self._answer("eval.rows", [str(folder)], None)

    def _answer(self, module: str, words: Sequence[str], device: str | None) -> dict[str, Any]:
        """Run a command whose answer is the last line that it prints."""
        command = [str(self.python), "-m", module, *words]
        try:
            code, said, complained = answer_of_child(command, self.environment(device), _ANSWER_SECONDS, self.children)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EvaluationError(f"{self.python} cannot be run ({error})") from error
        if code != 0:
            raise EvaluationError(_complaint(complained, code, self.python))
        try:
            answer = json.loads(said.strip().splitlines()[-1])
        except (ValueError, IndexError):
            answer = None
        if not isinstance(answer, dict):
            raise EvaluationError(
                f"{self.python} -m {module} gave no answer; is it the Python of `make eval-install`?"
            )
        return answer

    def run(self, words: Sequence[str], out: Path, device: str | None, log: Path) -> None:
        """Run an evaluation into its folder, or go on there; its output goes to ``log``.

        Whatever ends this process ends the harness and its server, too.

        Raises:
            EvaluationError: the evaluation failed; what was answered is kept.
        """
        evaluation = [str(self.python), "-m", "eval.run", *words, "--out", str(out)]
        keeper = [sys.executable, str(self.folder / "keeper.py"), str(_GRACE_SECONDS), *evaluation]
        until = time.monotonic() + _IN_USE_SECONDS
        while True:
            code, said = run_child(
                keeper, self.environment(device), log, "", self.children, patience=2.0 * _GRACE_SECONDS
            )
            if "is in use by" not in said or time.monotonic() > until:
                break
            time.sleep(3.0)
        if code != 0:
            raise EvaluationError(f"{_complaint(said, code, self.python)} (its log: {log})")

    def sign_flip(self) -> SignFlip:
        """Load the harness's own test of paired differences; its file needs NumPy alone.

        Returns:
            The function: paired differences, one array per task, to a p value.
        """
        spec = importlib.util.spec_from_file_location("llamafactory_adaptive_eval_stats", self.folder / "stats.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        test: SignFlip = module.sign_flip_p
        return test


def _complaint(said: str, code: int, python: Path) -> str:
    """Return the harness's own message, or the last line where it left none, in the words of this command."""
    if _SAID in said:
        return in_our_words(said.rpartition(_SAID)[2].strip())
    return f"the harness in {python} ended with exit code {code}{last_words(said)}"


def is_complete(out: Path) -> bool:
    """Tell whether the evaluation in a folder is finished.

    Raises:
        EvaluationError: its state cannot be read.
    """
    path = out / _STATE_FILE
    return path.is_file() and bool(read_mapping(path, str(path), error=EvaluationError).get("complete"))
