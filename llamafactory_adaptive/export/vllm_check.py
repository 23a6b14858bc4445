"""Ask a real vLLM, in an environment of its own, what it makes of an exported folder."""

import json
import os
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llamafactory_adaptive.errors import AdaptiveConfigError, Problem
from llamafactory_adaptive.export import vllm_probe
from llamafactory_adaptive.export.parity import TOP_K
from llamafactory_adaptive.export.source import ExportError


TIME_LIMIT_S = 1800
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing can be left behind
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


def check_vllm(python: Path) -> None:
    """Whether ``python`` is an interpreter that has vLLM.

    Raises:
        AdaptiveConfigError: it is none.
    """
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        code = subprocess.run([str(python), "-c", probe], capture_output=True, timeout=60, check=False).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        why = f"it cannot be run ({getattr(error, 'strerror', None) or error})"
    else:
        if code == 0:
            return
        why = "it has no vLLM"
    suggestion = "--vllm-python <environment with vLLM>/bin/python"
    raise AdaptiveConfigError([Problem("vllm_python", str(python), why, suggestion)])


def ask_vllm(python: Path, model: Path, adapter: Path | None, rank: int | None, rows: list[list[int]]) -> VllmAnswer:
    """Load ``model`` (and ``adapter``) in vLLM and read off the first token after each prompt.

    Raises:
        ExportError: vLLM failed or took longer than half an hour.
    """
    job = {
        "model": str(model.resolve()), "adapter": str(adapter.resolve()) if adapter else None,
        "max_lora_rank": rank, "rows": rows, "top_k": TOP_K,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        question, answer, log = (Path(place, name) for name in ("job.json", "answer.json", "log.txt"))
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
    """Run in a session of its own, so that it can be ended with everything it started."""
    # The probe must not find this environment's packages.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**_ENVIRONMENT, **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = process.wait(TIME_LIMIT_S)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"vLLM did not answer within {TIME_LIMIT_S} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise ExportError(f"vLLM could not serve the export (exit code {code}): " + " | ".join(lines[-3:]))


def difference_of_first_tokens(reference: list[Tensor], answer: list[dict[int, float]]) -> float:
    """Largest distance between PEFT's log-probabilities at the last place of each prompt and vLLM's answer."""
    return max(
        abs(float(expected[-1, token]) - value)
        for expected, row in zip(reference, answer, strict=True)
        for token, value in row.items()
    )
