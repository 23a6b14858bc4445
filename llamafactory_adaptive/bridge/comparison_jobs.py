"""Jobs of a comparison in processes of their own: the split of the rows; one run, with the losses of held-out rows."""

import gc
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llamafactory_adaptive.bridge.arguments import Args, our_keys
from llamafactory_adaptive.bridge.child import alone, last_words, run_child
from llamafactory_adaptive.bridge.host_loading import open_host
from llamafactory_adaptive.calibration.batches import IGNORE_INDEX, holds_media, length_sorted, make_batches
from llamafactory_adaptive.calibration.row_losses import row_losses
from llamafactory_adaptive.comparison.differences import FEWEST_ROWS
from llamafactory_adaptive.errors import CalibrationError, DivergedError
from llamafactory_adaptive.files import read_json, write_atomically


COMPARISON_JOB = "comparison-job"  # the internal command that runs a job
_PREFIX = "base_model.model."  # of PEFT, before every name of a module
HELD_OUT = "held_out.json"
TRAIN = "train"

Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class SplitJob:
    """The split of a run's rows into those that all arms train on, and two held-out halves.

    Attributes:
        settings: the settings of the YAML; ``eval_dataset`` or ``val_size``, if given, say which rows are held out.
        rows: number of held-out rows, of both halves together.
        folder: where the tokenised rows go.
    """

    settings: Args
    rows: int
    folder: str

    def run(self) -> dict[str, Any]:
        """Tokenise and split the rows, and return how many there are of each part."""
        with open_host(_plain(self.settings), "the comparison") as host:
            train, held_out = host.read_rows(self._split)
        train.save_to_disk(str(Path(self.folder) / TRAIN))
        halves = {"dev": held_out[::2], "test": held_out[1::2]}
        write_atomically(Path(self.folder) / HELD_OUT, json.dumps(halves))
        return {"train": len(train), **{half: len(rows) for half, rows in halves.items()}}

    def _split(self, data: Mapping[str, Any]) -> tuple[Any, Rows]:
        """Return the training set without the held-out rows, and these, in random order."""
        train, given = data["train_dataset"], data.get("eval_dataset")
        draw = random.Random(0)
        if given is None:
            picked = set(draw.sample(range(len(train)), min(self.rows, len(train) // 2)))
            source, train = train, train.select([index for index in range(len(train)) if index not in picked])
        else:
            sets = list(given.values()) if isinstance(given, Mapping) else [given]
            source = [row for rows in sets for row in rows]
            picked = set(draw.sample(range(len(source)), min(self.rows, len(source))))
        held_out = [_tokens(source[index]) for index in draw.sample(sorted(picked), len(picked))]
        held_out = [row for row in held_out if any(label != IGNORE_INDEX for label in row["labels"][1:])]
        if len(held_out) < 2 * FEWEST_ROWS:
            raise CalibrationError(
                f"{len(held_out)} rows with an answer can be held out, and a comparison needs {2 * FEWEST_ROWS}: give "
                "more rows, or an eval_dataset"
            )
        seen = {tuple(row["input_ids"]) for row in held_out}
        kept = [index for index, ids in enumerate(train["input_ids"]) if tuple(ids) not in seen]
        return train.select(kept), held_out


def _plain(settings: Args) -> Args:
    """Return the settings by which the host loads base model and rows, without an adapter."""
    dropped = {*our_keys(settings), "adapter_name_or_path", "resume_from_checkpoint", "deepspeed"}
    kept = {key: value for key, value in settings.items() if key not in dropped}
    return {**kept, "finetuning_type": "lora", "do_train": True, "report_to": "none", "packing": False}


def _tokens(row: Mapping[str, Any]) -> dict[str, list[int]]:
    if holds_media(row):
        raise CalibrationError("rows hold images, video or audio, and a comparison measures the loss of texts")
    if "input_ids" not in row or "labels" not in row:
        raise CalibrationError("rows have no single answer: a comparison takes stage: sft or stage: pt")
    return {"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}


@dataclass(frozen=True)
class RunJob:
    """One run of a comparison: training as the host does it, then the loss of every held-out row.

    Attributes:
        settings: complete settings of the run, with ``output_dir`` and the split's ``tokenized_path``.
        rows: file with the held-out rows; None if only time is measured.
        batch_size: rows of a batch that is judged.
    """

    settings: Args
    rows: str | None
    batch_size: int = 8

    def run(self) -> dict[str, Any]:
        """Run the training, and return ``status``, losses of held-out rows, parameters and seconds."""
        from llamafactory.train.tuner import run_exp

        started, stop = time.perf_counter(), _divergence_callback()
        try:
            run_exp(args=dict(self.settings), callbacks=[stop])
        except DivergedError as error:
            return {"status": "diverged", "why": str(error)}
        if stop.diverged:
            return {"status": "diverged", "why": f"the loss was not finite at step {stop.diverged}"}
        seconds = time.perf_counter() - started
        adapter = Path(str(self.settings["output_dir"]))
        if (converted := adapter / "pissa_converted").is_dir():  # on the base as it is, of twice the rank
            adapter = converted
        outcome = {"status": "done", "seconds": round(seconds, 1), "training_seconds": stop.seconds,
                   "steps": stop.steps, "adapter": str(adapter), **_facts_of(adapter)}  # fmt: skip
        return outcome if self.rows is None else {**outcome, **self._judge(adapter, Path(self.rows))}

    def _judge(self, adapter: Path, rows: Path) -> dict[str, Any]:
        """Compute the mean loss per row of both halves, with the adapter as it was saved."""
        from peft import PeftModel

        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.memory.empty_cache()
        halves = read_json(rows, "the held-out rows")
        with open_host(_plain(self.settings), "the comparison") as host:
            model = PeftModel.from_pretrained(host.load_base(), str(adapter)).eval()
            pad_id = host.tokenizer.pad_token_id or 0
            losses = {half: losses_by_row(model, held, self.batch_size, pad_id) for half, held in halves.items()}
        finite = all(math.isfinite(value) for values in losses.values() for value in values)
        return losses if finite else {"status": "diverged", "why": "the loss of held-out rows is not finite"}


Job = SplitJob | RunJob
_JOBS: dict[str, Callable[..., Job]] = {"split": SplitJob, "run": RunJob}


def encode_job(job: Job) -> str:
    """Encode a job as one line."""
    kind = next(name for name, cls in _JOBS.items() if type(job) is cls)
    return json.dumps({"kind": kind, **asdict(job)}, default=str)


def decode_job(line: str) -> Job:
    """Build the job that :func:`encode_job` encoded."""
    values = json.loads(line)
    return _JOBS[values.pop("kind")](**values)


def run_in_own_process(job: Job, device: str | None, log: Path) -> dict[str, Any]:
    """Run a job in a fresh process with one device, and return what came of it.

    Args:
        job: what to do.
        device: as ``CUDA_VISIBLE_DEVICES`` names it; None for the first.
        log: file for all that the process prints.

    Raises:
        CalibrationError: the job failed; the message is its own, or the last line that it printed.
    """
    with tempfile.TemporaryDirectory(prefix="adaptive-") as scratch:
        answer = Path(scratch) / "answer.json"
        command = [sys.executable, "-m", "llamafactory_adaptive.cli", COMPARISON_JOB, str(answer)]
        code, said = run_child(command, alone(device), log, encode_job(job))
        held = read_json(answer, "the answer of a job") if answer.exists() else {}
    if "result" in held:
        result: dict[str, Any] = held["result"]
        return result
    why = held.get("error") or f"it ended with exit code {code}{last_words(said)}"
    raise CalibrationError(f"{why} (its log: {log})")


def losses_by_row(model: Any, rows: Rows, batch_size: int, pad_id: int) -> list[float]:
    """Compute the mean loss over the answer tokens of each row, in the order of ``rows``."""
    device = next(model.parameters()).device
    order = [index for group in length_sorted([len(row["input_ids"]) for row in rows], batch_size) for index in group]
    batches = [batch.to(device) for batch in make_batches(rows, batch_size, pad_id)]
    means = (total / tokens for total, tokens in row_losses(model, batches).tolist())
    return [mean for _, mean in sorted(zip(order, means, strict=True))]


def answer_tokens(rows: Sequence[Mapping[str, Sequence[int]]]) -> list[int]:
    """Count the labelled tokens of each row."""
    return [sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in rows]


def _facts_of(adapter: Path) -> dict[str, Any]:
    """Count the parameters of a saved adapter, its ranks by module, and the parameters of its cheapest rank."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    pairs = [
        (shape, shapes[key.replace(".lora_A", ".lora_B")], key) for key, shape in shapes.items() if ".lora_A" in key
    ]
    return {
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "parameters_of_one_rank": min(a[1] + b[0] for a, b, _ in pairs),
        "ranks": {key.partition(".lora_A")[0].removeprefix(_PREFIX): a[0] for a, _, key in pairs},
    }


def _divergence_callback() -> Any:
    """Build a callback that ends a run whose loss is not finite, and keeps the seconds of its steps."""
    from transformers import TrainerCallback

    class StopDiverged(TrainerCallback):  # type: ignore[misc]
        diverged, steps, seconds = 0, 0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.steps, self.seconds = state.global_step, round(time.perf_counter() - self.began, 2)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            # The Trainer leaves a loss that is not finite out of its mean; the norm of the gradient tells.
            said = [float(logs[key]) for key in ("loss", "grad_norm") if key in (logs or {})]
            if not all(map(math.isfinite, said)):
                self.diverged, control.should_training_stop = state.global_step, True

    return StopDiverged()
