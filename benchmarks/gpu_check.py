"""What only a GPU can prove, in ten minutes at most: tests, overhead, calibration, a small comparison, vLLM.

Run: ``python benchmarks/gpu_check.py [--only NAME,...]``; exits with 2 where there is no GPU, and with 1 if a part
failed.

Every part is a process of its own with a limit of its own, and has an entry in the result: its figures, or why there
are none.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record


ROOT = Path(__file__).parents[1]
VLLM_PYTHON = "LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON"
MOST_SECONDS = 600


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        seconds: limit of its time.
        command: what runs; ``{results}`` is the folder that benchmarks write to.
        read: makes the figures from that folder and what was printed.
        needs: returns why the part cannot run, or nothing.
    """

    seconds: int
    command: Sequence[str]
    read: Callable[[Path, str], dict[str, Any]]
    needs: Callable[[], str | None] = lambda: None


def tests_of(results: Path, printed: str) -> dict[str, Any]:
    """Numbers of tests by outcome, and the names of those that failed."""
    numbers = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", printed)}
    return {**numbers, "not_passed": re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)}


def overhead_of(results: Path, printed: str) -> dict[str, Any]:
    figures = json.loads((results / "overhead.json").read_text(encoding="utf-8"))
    return {"device": figures["device"], "targets": figures["targets"], "variants": figures["variants"]}


def calibration_of(results: Path, printed: str) -> dict[str, Any]:
    figures = json.loads((results / "calibration.json").read_text(encoding="utf-8"))
    return {key: figures[key] for key in ("device", "samples", "tokens", "results", "details", "peak_megabytes")}


def comparison_of(results: Path, printed: str) -> dict[str, Any]:
    figures = json.loads((results / "worth_it_data_limited.json").read_text(encoding="utf-8"))
    arms = figures["comparison"]["arms"]
    if failed := [f"{arm['name']}: {arm['failed']}" for arm in arms if "failed" in arm]:
        raise ValueError(f"an arm could not be run: {failed[0]}")
    kept = ("best", "loss", "seconds", "parameters", "equal_parameters")
    return {
        "device": figures["device"],
        "steps": figures["steps"],
        "arms": {arm["name"]: {key: arm[key] for key in kept} for arm in arms},
    }


def vllm_python() -> str:
    return os.environ.get(VLLM_PYTHON) or str(ROOT / ".venv-eval" / "bin" / "python")


def needs_vllm() -> str | None:
    if Path(vllm_python()).exists():
        return None
    return f"there is no evaluation environment (make eval-install, or {VLLM_PYTHON}=<its python>)"


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE"]
OVERHEAD = ["--only", "uniform again,igu,adalora,tsq ranks alone"]
# One rate and no other tried beyond it: two runs for each arm, which is what the limit leaves time for.
SMALL = ["--steps", "12", "--held-out", "40", "--seeds", "1", "--rates", "2e-3", "--arms", "lora,random,igu",
         "--record", "--", "--extensions", "0"]  # fmt: skip
PARTS = {
    "tests": Part(150, [*PYTEST, "-m", "gpu", "tests"], tests_of),
    "overhead": Part(150, [sys.executable, "benchmarks/overhead.py", *OVERHEAD], overhead_of),
    "calibration": Part(
        60, [sys.executable, "benchmarks/calibration.py", "--samples", "64", "--repeats", "3"], calibration_of
    ),
    "worth-it": Part(150, [sys.executable, "benchmarks/worth_it.py", "data_limited", *SMALL], comparison_of),
    "vllm": Part(
        80,
        [*PYTEST, "-m", "eval_env or not eval_env", "-k", "vllm", "tests/unit/export/test_refusals.py"],
        tests_of,
        needs_vllm,
    ),
}
assert sum(part.seconds for part in PARTS.values()) <= MOST_SECONDS


def run_part(part: Part) -> dict[str, Any]:
    """Run a part within its limit, and return its entry; what it started ends with it."""
    if reason := part.needs():
        return {"status": f"skipped because {reason}"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch)
        environment = {**os.environ, record.RESULTS_ENV: scratch, VLLM_PYTHON: vllm_python()}
        process = subprocess.Popen(part.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, start_new_session=True)  # fmt: skip
        try:
            printed, _ = process.communicate(timeout=part.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            return {"status": f"stopped after its {part.seconds} seconds", "printed": printed[-2000:]}
        entry: dict[str, Any] = {"status": "done", "seconds": round(time.monotonic() - started, 1)}
        if process.returncode:
            entry |= {"status": f"failed with exit code {process.returncode}", "printed": printed[-2000:]}
        try:
            entry["figures"] = part.read(results, printed)
        except (OSError, KeyError, ValueError) as error:
            entry |= {"status": f"{entry['status']}, without figures ({type(error).__name__}: {error})"}
    return entry


def gpu() -> str | None:
    """Name of the GPU; None where there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="names of parts, comma separated")
    chosen = parser.parse_args().only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]}; the parts are {', '.join(PARTS)}")
    device = gpu()
    if device is None:
        print("gpu-check: this machine has no CUDA device that torch sees, so nothing is checked", file=sys.stderr)
        return 2
    entries = {}
    for name in chosen:
        print(f"{name}: at most {PARTS[name].seconds} s", flush=True)
        entries[name] = run_part(PARTS[name])
        print(f"{name}: {entries[name]['status']}", flush=True)
        path = record.write_result("gpu_check", {"device": device, "parts": entries})
    print(f"written to {path}")
    return int(any(not re.match("done$|skipped", entry["status"]) for entry in entries.values()))


if __name__ == "__main__":
    sys.exit(main())
