"""Measurements in a process of their own, or in the one that trains: the host's model and rows loaded for scoring."""

import io
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from llamafactory_adaptive.accelerator import peak_memory
from llamafactory_adaptive.bridge.arguments import Args
from llamafactory_adaptive.bridge.base_loading import BaseHandover
from llamafactory_adaptive.bridge.base_placing import placed_base, visible_devices
from llamafactory_adaptive.bridge.child import alone, last_words, run_child
from llamafactory_adaptive.bridge.host_loading import (
    LESS_MEMORY,
    Host,
    as_calibration_error,
    open_host,
    rows_of,
    seeing_one_device,
)
from llamafactory_adaptive.bridge.scoring_job import ScoringJob
from llamafactory_adaptive.calibration.batches import count_tokens, holds_media, make_batches
from llamafactory_adaptive.calibration.devices import input_device
from llamafactory_adaptive.calibration.measurement import Measurement, needs_rows
from llamafactory_adaptive.config.run_config import CalibrationConfig
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.files import digest_of, read_mapping, replacing
from llamafactory_adaptive.methods import make_method
from llamafactory_adaptive.planning.cache import cache_folder
from llamafactory_adaptive.planning.starts import start_measurement
from llamafactory_adaptive.reports.plaintext import tell


class Job(Protocol):
    """What another process is to do, as it is sent there."""

    @property
    def settings(self) -> Args:
        """Return the host's settings for loading model and rows."""

    @property
    def path(self) -> Path:
        """Return the file for the result, in an empty folder."""

    def to_json(self) -> dict[str, Any]:
        """Encode the job as a mapping of JSON values."""


class RowDraw(Protocol):
    """What says which rows are drawn, and how many: a run's configuration, for one."""

    @property
    def calibration(self) -> CalibrationConfig:
        """Return number, batch size and the seed of the draw."""


def measure_in_own_process(job: ScoringJob) -> None:
    """Run a measurement in a fresh single process, which leaves no memory, random state or process group behind.

    Raises:
        CalibrationError: the measurement failed; the message is the child's own, or the last line that it printed.
    """
    tell(_announcement(job, "in a process of its own", "it loads the model once, then"))
    run_job(job, visible_devices(job.config.placement))


def measure_in_training_process(job: ScoringJob, handover: BaseHandover) -> None:
    """Run a measurement on the base that this process trains afterwards, and leave no other trace of it.

    Raises:
        CalibrationError: the measurement failed.
    """
    tell(_announcement(job, "in this process, which trains it next", "it"))
    with _random_state_kept(), _printing_to(_log()):
        run_measurement_job(job, handover.opened)


def _announcement(job: ScoringJob, where: str, it: str) -> str:
    """Describe in one sentence what is about to be measured, and what that takes."""
    model, rows = job.settings["model_name_or_path"], rows_of(job.settings)
    if job.start_rank is not None:
        passes = "forward passes over them" if job.config.init == "eva" else "a backward pass over them"
        start = f"computing what the factors start from (adaptive_init: {job.config.init})"
        return f"{start} on rows of {rows} {where}; {it} takes {passes}"
    if needs_rows(_measurement(job)):
        return f"scoring {model} on rows of {rows} {where}; {it} takes about as long as a forward pass over them"
    return f"scoring the weights of {model} {where}; no rows are read"


def _random_state_kept() -> AbstractContextManager[None]:
    from llamafactory_adaptive.bridge.random_state import random_state_kept

    return random_state_kept()


def _log() -> Path:
    return cache_folder() / "logs" / f"scoring-{os.getpid()}.log"


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Keep what the host prints within the context; where something goes wrong, it is written to a log."""
    said, level = io.StringIO(), logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(said):
            yield
    except CalibrationError as error:
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(said.getvalue(), encoding="utf-8")
        raise CalibrationError(f"{error} (the whole log: {log})") from error
    finally:
        logging.disable(level)


def _measurement(job: ScoringJob) -> Measurement:
    measurement: Measurement | None
    if job.start_rank is not None:
        measurement = start_measurement(job.config, job.start_rank)
    else:
        measurement = make_method(job.config.method, job.config.options).measurement()
    assert measurement is not None
    assert measurement.key == job.measurement
    return measurement


def run_job(job: Job, devices: str | None = None) -> None:
    """Run a job in a fresh single process, which writes its result to the job's path.

    Args:
        job: what is to be done.
        devices: the devices that it sees, as ``CUDA_VISIBLE_DEVICES`` names them; None for the first of this process.

    Raises:
        CalibrationError: as :func:`measure_in_own_process`.
    """
    assert not any(job.path.parent.iterdir())
    answer = job.path.with_name("answer.json")
    command = [sys.executable, "-m", "llamafactory_adaptive.cli", "measure", str(answer)]
    log = _log()
    code, said = run_child(command, alone(devices), log, json.dumps(job.to_json(), default=str))
    message = read_mapping(answer, "the scoring process's answer")["error"] if answer.exists() else None
    if code == 0:
        log.unlink(missing_ok=True)
    elif message:
        raise CalibrationError(f"{message} (the scoring process's whole log: {log})")
    else:
        raise CalibrationError(f"{_last_words(code, said)} (the whole log: {log})")


def _last_words(code: int, said: str) -> str:
    """Describe in one line how the scoring process ended."""
    words = last_words(said)
    if code == -signal.SIGKILL:
        return f"the scoring process was killed, as a rule because memory ran out: {LESS_MEMORY}{words}"
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the scoring process {how}{words}"


# Opens the base that a host's settings name, for a measurement.
Opened = Callable[[Host], AbstractContextManager[Any]]


def run_measurement_job(job: ScoringJob, opened: Opened | None = None) -> None:
    """Load the model, and rows where they are needed, measure, and write the statistics atomically.

    Args:
        job: what is measured.
        opened: opens the base in a process that goes on after it; None in the scoring process, whose work this is.
    """
    less_memory = LESS_MEMORY if opened is None else _LESS_MEMORY_HERE
    devices = seeing_one_device() if opened is None else nullcontext()
    with devices, open_host(job.settings, "scoring", less_memory) as host:
        rows = _rows_of_job(job, host)
        what = f"{job.settings['model_name_or_path']} cannot be scored"
        base = opened(host) if opened else placed_base(job.config.placement, host)
        with base as model, as_calibration_error(what, less_memory):
            _measure(job, model, rows, host.tokenizer.pad_token_id or 0)


_LESS_MEMORY_HERE = (
    "lower adaptive_calibration_batch_size or cutoff_len, train in 4-bit (quantization_bit: 4), or set "
    "adaptive_calibration_process: own, which spreads the base over all GPUs, CPU memory and disk"
)


def _rows_of_job(job: ScoringJob, host: Host) -> list[dict[str, list[int]]]:
    if not needs_rows(_measurement(job)):
        return []
    return host.read_rows(lambda data: _draw_rows(data["train_dataset"], job.config, host.streaming))


def _measure(job: ScoringJob, model: Any, rows: list[dict[str, list[int]]], pad_id: int) -> None:
    import torch
    from safetensors.torch import save_file

    from llamafactory_adaptive.adapter.lora import keep_4bit_unpacked_on_cpu

    keep_4bit_unpacked_on_cpu(model)
    device = input_device(model)
    batches = [batch.to(device) for batch in make_batches(rows, job.config.calibration.batch_size, pad_id)]
    started = time.perf_counter()
    modules = {name: model.get_submodule(name) for name in job.modules}
    try:
        tensors = _measurement(job)(model, modules, batches)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            "out of memory while scoring: lower adaptive_calibration_batch_size (now "
            f"{job.config.calibration.batch_size}) or score in 4-bit, or set adaptive_calibration_process: own with "
            "adaptive_calibration_device_map: auto, to spread the base over all GPUs, CPU memory and disk "
            "(docs/how-to.md)"
        ) from error
    facts = {
        "seconds": f"{time.perf_counter() - started:.3f}",
        "tokens": str(count_tokens(batches)),
        "samples": str(len(rows)),
        "rows_sha256": digest_of([list(row["input_ids"]) for row in rows]),
        "peak_memory": json.dumps(peak_memory()),
    }
    with replacing(job.path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=facts)


def load(settings: Args, config: RowDraw, part: str = "train_dataset") -> tuple[Any, list[dict[str, list[int]]], int]:
    """Load the model for inference, rows of a part of the data and the padding id, as the host would for this run."""
    with open_host(settings, "scoring") as host:
        rows = host.read_rows(lambda data: _draw_rows(data[part], config, host.streaming))
        return host.load_base(), rows, host.tokenizer.pad_token_id or 0


def _draw_rows(dataset: Any, config: RowDraw, streaming: bool) -> list[dict[str, list[int]]]:
    """Draw calibration rows by their seed, as token ids and labels, whatever the stage's columns are called."""
    seed, wanted = config.calibration.seed, config.calibration.samples
    if streaming:
        picked: Iterable[Any] = islice(dataset.shuffle(seed=seed, buffer_size=max(1000, 4 * wanted)), wanted)
    else:
        indices = random.Random(seed).sample(range(len(dataset)), min(wanted, len(dataset)))
        picked = (dataset[index] for index in sorted(indices))
    rows = []
    for sample in picked:
        if holds_media(sample):
            raise CalibrationError(
                "calibration rows hold images, video or audio; set adaptive_calibration_dataset to a text dataset"
            )
        key = "chosen_" if "chosen_input_ids" in sample else ""
        ids = sample[f"{key}input_ids"]
        labels = sample.get(f"{key}labels") or ids
        mask = sample.get(f"{key}attention_mask") or [1] * len(ids)  # tokenised folders may hold packed, padded rows
        kept = [index for index, flag in enumerate(mask) if flag]
        rows.append({"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]})
    return rows
