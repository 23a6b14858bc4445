"""Jobs of a comparison in processes of their own: the split of the rows; one run, with held-out losses; a merge.

A job is sent through a pipe, as its settings may hold a token of a hub, with which model and rows are loaded.
"""

import gc
import json
import math
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS, TENSOR_PREFIX
from llamafactory_adaptive.bridge.arguments import Args
from llamafactory_adaptive.bridge.child import Children, alone, last_words, run_child
from llamafactory_adaptive.bridge.comparison_rows import Rows, SplitJob, base_settings
from llamafactory_adaptive.bridge.divergence_callback import divergence_callback
from llamafactory_adaptive.bridge.host_loading import open_host
from llamafactory_adaptive.bridge.merge_job import MergeJob
from llamafactory_adaptive.calibration.batches import length_sorted, make_batches
from llamafactory_adaptive.calibration.row_losses import row_losses
from llamafactory_adaptive.errors import AdaptiveError, CalibrationError, DivergedError, OtherProcessError, OutputError
from llamafactory_adaptive.files import cannot_write, could_not_write, read_json


COMPARISON_JOB = "comparison-job"  # the internal command that runs a job
LESS_MEMORY = (
    "lower per_device_train_batch_size and raise gradient_accumulation_steps, lower cutoff_len, or set "
    "quantization_bit: 4"
)
# Errors of a job after which no other job would fare better.
_KINDS: dict[str, type[AdaptiveError]] = {"OutputError": OutputError, "OtherProcessError": OtherProcessError}


@dataclass(frozen=True)
class RunJob:
    """One run of a comparison: training as the host does it, then the loss of every held-out row.

    Attributes:
        settings: complete settings of the run, with ``output_dir`` and the split's ``tokenized_path``.
        rows: file with the held-out rows.
        batch_size: rows of a batch that is judged; fewer where memory runs out.
    """

    settings: Args
    rows: str
    batch_size: int = 8

    def run(self) -> dict[str, Any]:
        """Run the training, and return ``status``, losses of held-out rows, parameters and seconds.

        Raises:
            OutputError: the disk is full.
            OtherProcessError: the device is lost.
            CalibrationError: memory ran out.
        """
        from llamafactory.train.tuner import run_exp

        started, stop = time.perf_counter(), divergence_callback()
        output = Path(str(self.settings["output_dir"]))
        with _in_words(output):
            try:
                run_exp(args=dict(self.settings), callbacks=[stop])
            except DivergedError as error:
                return {"status": "diverged", "why": str(error)}
        if stop.diverged:
            return {"status": "diverged", "why": stop.diverged}
        for file in output.rglob("training_args.bin"):  # a pickle of all arguments
            file.unlink()
        seconds = time.perf_counter() - started
        adapter = output
        if (converted := output / "pissa_converted").is_dir():  # on the base as it is, of twice the rank
            adapter = converted
        outcome = {"status": "done", "seconds": round(seconds, 1), "training_seconds": stop.seconds,
                   "steps": stop.steps, "adapter": str(adapter), **_facts_of(adapter)}  # fmt: skip
        with _in_words(output):
            return {**outcome, **self._judge(adapter)}

    def _judge(self, adapter: Path) -> dict[str, Any]:
        """Compute the mean loss per row of both halves, with the adapter as it was saved."""
        from peft import PeftModel

        _free_memory()
        halves = read_json(Path(self.rows), "the held-out rows")
        with open_host(base_settings(self.settings), "the comparison", LESS_MEMORY) as host:
            model = PeftModel.from_pretrained(host.load_base(), str(adapter)).eval()
            pad_id = host.tokenizer.pad_token_id or 0
            losses = {half: losses_by_row(model, held, self.batch_size, pad_id) for half, held in halves.items()}
        finite = all(math.isfinite(value) for values in losses.values() for value in values)
        return losses if finite else {"status": "diverged", "why": "the loss of held-out rows is not finite"}


Job = SplitJob | RunJob | MergeJob
_JOBS: dict[str, Callable[..., Job]] = {"split": SplitJob, "run": RunJob, "merge": MergeJob}


def encode_job(job: Job) -> str:
    """Encode a job as one line."""
    kind = next(name for name, cls in _JOBS.items() if type(job) is cls)
    return json.dumps({"kind": kind, **asdict(job)}, default=str)


def decode_job(line: str) -> Job:
    """Build the job that :func:`encode_job` encoded."""
    values = json.loads(line)
    return _JOBS[values.pop("kind")](**values)


def run_in_own_process(job: Job, device: str | None, log: Path, children: Children | None = None) -> dict[str, Any]:
    """Run a job in a fresh process with one device, and return what came of it.

    Args:
        job: what to do.
        device: as ``CUDA_VISIBLE_DEVICES`` names it; None for the first.
        log: file for all that the process prints.
        children: through which another thread may end the process.

    Raises:
        AdaptiveError: the job failed; class and message are its own, or CalibrationError with its last line.
    """
    with tempfile.TemporaryDirectory(prefix="adaptive-") as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "llamafactory_adaptive.cli", COMPARISON_JOB, str(answer)]
        code, said = run_child(command, alone(device), log, encode_job(job), children)
        held = read_json(answer, "the answer of a job") if answer.exists() else {}
    if "result" in held:
        result: dict[str, Any] = held["result"]
        return result
    kind = _KINDS.get(held.get("kind", ""), CalibrationError)
    killed = f"it was killed, as a rule because memory ran out: {LESS_MEMORY}"
    ended = killed if code == -signal.SIGKILL else f"it ended with exit code {code}"
    raise kind(f"{held.get('error') or ended + last_words(said)} (its log: {log})")


@contextmanager
def _in_words(output: Path) -> Iterator[None]:
    """Convert errors that tell of the machine to one line each; print their traceback, which goes to the log."""
    try:
        yield
    except AdaptiveError:
        raise
    except Exception as error:
        traceback.print_exc()
        if could_not_write(error):
            raise cannot_write(output, error) from error
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in str(error):
            raise CalibrationError(f"memory ran out: {LESS_MEMORY}") from error
        if "CUDA error" in str(error) or "CUDA driver" in str(error):
            raise OtherProcessError(f"the device is lost ({str(error).splitlines()[0]})") from error
        raise


def losses_by_row(model: Any, rows: Rows, batch_size: int, pad_id: int) -> list[float]:
    """Compute the mean loss over the answer tokens of each row, in the order of ``rows``.

    Where memory runs out, batches are halved.
    """
    while True:
        try:
            return _losses_by_row(model, rows, batch_size, pad_id)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2
        _free_memory()


def _losses_by_row(model: Any, rows: Rows, batch_size: int, pad_id: int) -> list[float]:
    device = next(model.parameters()).device
    order = [index for group in length_sorted([len(row["input_ids"]) for row in rows], batch_size) for index in group]
    batches = [batch.to(device) for batch in make_batches(rows, batch_size, pad_id)]
    means = (total / tokens for total, tokens in row_losses(model, batches).tolist())
    return [mean for _, mean in sorted(zip(order, means, strict=True))]


def _free_memory() -> None:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


def _facts_of(adapter: Path) -> dict[str, Any]:
    """Count the parameters of a saved adapter, its ranks by module, and the parameters of its cheapest rank."""
    from safetensors import safe_open

    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    pairs = [
        (shape, shapes[key.replace(".lora_A", ".lora_B")], key) for key, shape in shapes.items() if ".lora_A" in key
    ]
    return {
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "parameters_of_one_rank": min(a[1] + b[0] for a, b, _ in pairs),
        "ranks": {key.partition(".lora_A")[0].removeprefix(TENSOR_PREFIX): a[0] for a, _, key in pairs},
    }
