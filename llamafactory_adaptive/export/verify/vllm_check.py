"""Checks of an exported folder in a real vLLM, which runs in an environment of its own."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.verify import vllm_probe
from llamafactory_adaptive.export.verify.log_probabilities import TOP_K


TIME_LIMIT_S = 1800
IMPORT_LIMIT_S = 120
READS_PATTERNS = (0, 32)  # the first vLLM that reads rank_pattern and alpha_pattern
_FORCED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process, which watches whether we are still there
_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; the default takes half the machine
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class VllmAnswer:
    """Log-probabilities of the first generated token per prompt, by token id: as exported, and of the base alone."""

    version: str
    device: str
    dtype: str
    exported: list[dict[int, float]]
    plain: list[dict[int, float]]

    def __str__(self) -> str:
        return f"vLLM {self.version} in {self.dtype} on {self.device}"


def check_vllm(python: Path, server: str) -> None:
    """Check that ``python`` is an interpreter with a vLLM of the kind that ``server`` means.

    Every layout for vLLM is right in both kinds, those that read patterns of ranks and those that do not. A check in
    the other kind would still show nothing about the one that the adapter is meant for.

    Raises:
        AdaptiveConfigError: ``python`` has no such vLLM.
    """
    version, why = _vllm_version(python)
    suggestion = "--vllm-python <environment with vLLM>/bin/python"
    if version and not (why := _misfit(version, server)):
        return
    if version:
        other = "vllm" if server == "vllm-legacy" else "vllm-legacy"
        suggestion = f"--for {other}, the Python of another environment, or leaving it out"
    refuse("vllm_python", str(python), why, suggestion)


def _vllm_version(python: Path) -> tuple[str, str]:
    """Return the version of vLLM in an environment and an empty text; or an empty version, and the reason."""
    probe = "import vllm; print(vllm.__version__)"
    # As in `_run`: packages of this environment are none of that one.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), "-c", probe]
    try:
        told = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=IMPORT_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"it cannot be run ({getattr(error, 'strerror', None) or error})"
    if told.returncode == 0 and (lines := told.stdout.split()):
        return lines[-1], ""
    complaint = (told.stderr.strip() or f"exit code {told.returncode}").splitlines()[-1]
    return "", f"it has no vLLM that can be imported ({complaint})"


def _misfit(version: str, server: str) -> str:
    """Return why a check in that version of vLLM shows nothing about a layout; empty if it is the right kind."""
    if server == "merged":
        return ""
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None:
        return f"its vLLM calls itself {version}, which does not tell whether it reads ranks by module"
    reads = (int(number[1]), int(number[2])) >= READS_PATTERNS
    if reads == (server == "vllm"):
        return ""
    habit = "reads rank_pattern and alpha_pattern" if reads else "does not read rank_pattern and alpha_pattern"
    return f"its vLLM {version} {habit}: an answer from it is no check of {server}"


def ask_vllm(python: Path, model: Path, adapter: Path | None, rank: int | None, rows: list[list[int]]) -> VllmAnswer:
    """Load ``model`` (and ``adapter``) in vLLM and return the log-probabilities of the first token after each prompt.

    Raises:
        ExportError: vLLM failed or took longer than half an hour.
    """
    job = {
        "model": str(model.resolve()), "adapter": str(adapter.resolve()) if adapter else None,
        "max_lora_rank": rank, "rows": rows, "top_k": TOP_K,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        question, answer, log = (Path(scratch, name) for name in ("job.json", "answer.json", "log.txt"))
        question.write_text(json.dumps(job), encoding="utf-8")
        _run([str(python), vllm_probe.__file__, str(question), str(answer)], log)
        document = json.loads(answer.read_text(encoding="utf-8"))
    return _parsed(document)


def _parsed(document: dict[str, Any]) -> VllmAnswer:
    by_token: dict[str, Any] = {
        key: [{int(token): value for token, value in row.items()} for row in document[key]]
        for key in ("exported", "plain")
    }
    return VllmAnswer(**{**document, **by_token})


def _run(command: list[str], log: Path) -> None:
    """Run the probe in a process session of its own, so that it can be ended with everything it started.

    The probe ends itself when its standard input closes, which happens however this process ends.

    Raises:
        ExportError: it took too long or failed.
    """
    # The probe must not find this environment's packages.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**_DEFAULTS, **environment, **_FORCED}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            code = process.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"vLLM did not answer within {TIME_LIMIT_S} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):  # raised where it and all it started have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if code != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ExportError(f"vLLM could not serve the export (exit code {code}): " + " | ".join(lines[-3:]))


def difference_of_first_tokens(reference: list[Tensor], answer: list[dict[int, float]]) -> float:
    """Compute the largest distance of vLLM's answer from PEFT's log-probabilities at the last place of each prompt.

    A NaN on either side makes the distance infinite.
    """
    distances = [
        abs(float(expected[-1, token]) - value)
        for expected, row in zip(reference, answer, strict=True)
        for token, value in row.items()
    ]
    return max(math.inf if math.isnan(distance) else distance for distance in distances)
