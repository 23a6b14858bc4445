"""Measurements in a process of their own: the host's model and training rows, loaded there and nowhere else."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, our_keys, split_names
from llamafactory_adaptive.bridge.loading import calibration_names, target_shapes, uses_tokenized_folder
from llamafactory_adaptive.calibration import Measurement, count_tokens, make_batches
from llamafactory_adaptive.config import AdaptiveConfig
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.files import digest_of, replacing
from llamafactory_adaptive.pipeline import make_method


# What a launcher tells its workers; the measuring process is none of them.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK",
                       "ROLE_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT",
                       "FORCE_TORCHRUN", "USE_RAY", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # fmt: skip


def measure_in_own_process(args: Args, measurement: Measurement, path: Path) -> None:
    """Run a measurement in a fresh single process, which leaves no memory, random state or process group behind.

    Raises:
        CalibrationError: with the child's own message.
        RuntimeError: the child crashed.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in _LAUNCHER_VARIABLES and not key.startswith("TORCHELASTIC_")
    }
    # One GPU: several visible ones without a launcher make the host refuse to start.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0] if visible is not None else "0"
    with tempfile.TemporaryDirectory(prefix="adaptive-") as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        job.write_text(json.dumps({"args": args, "measurement": measurement.key, "path": str(path)}, default=str))
        command = [sys.executable, "-m", "llamafactory_adaptive.cli", "measure", str(job), str(answer)]
        code = subprocess.run(command, env=environment, stdout=2, check=False).returncode
        message = json.loads(answer.read_text())["error"] if answer.exists() else None
    if message:
        raise CalibrationError(message)
    if code != 0:
        raise RuntimeError(f"the scoring process ended with exit code {code}; its own messages stand above")


def run_measurement_job(job: Mapping[str, Any], config: AdaptiveConfig) -> None:
    """Body of the measuring process: load, measure, write the statistics atomically."""
    import torch
    from safetensors.torch import save_file

    from llamafactory_adaptive.adapter import keep_4bit_unpacked_on_cpu

    args, path = job["args"], Path(job["path"])
    measurement = make_method(config).measurement()
    assert measurement is not None
    assert measurement.key == job["measurement"]
    shapes = target_shapes(args)
    try:
        model, rows, pad_id = _load(args, config)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"LLaMA-Factory cannot load model and data for scoring: {error}") from error
    keep_4bit_unpacked_on_cpu(model)
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in make_batches(rows, config.calibration.batch_size, pad_id)]
    started = time.perf_counter()
    modules = {shape.name: model.get_submodule(shape.name) for shape in shapes}
    try:
        tensors = measurement(model, modules, batches)
    except torch.OutOfMemoryError as error:
        raise CalibrationError(
            "out of memory while scoring: lower adaptive_calibration_batch_size (now "
            f"{config.calibration.batch_size}) or score in 4-bit (docs/how-to.md)"
        ) from error
    facts = {
        "seconds": f"{time.perf_counter() - started:.3f}",
        "tokens": str(count_tokens(batches)),
        "samples": str(len(rows)),
        "rows_sha256": digest_of([list(row["input_ids"]) for row in rows]),
    }
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=facts)


def _load(args: Args, config: AdaptiveConfig) -> tuple[Any, list[dict[str, list[int]]], int]:
    """Model ready for inference, calibration rows, padding id: as the host would load them for this run."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.hparams import parser as host
    from llamafactory.model import load_model, load_tokenizer
    from transformers import HfArgumentParser

    # The whole settings once through the host's own checks: what it refuses must not wait until after scoring.
    whole = {key: value for key, value in args.items() if key not in _OTHER_PROCESS}
    HfArgumentParser(host._TRAIN_ARGS).parse_dict(whole, allow_extra_keys=True)

    with tempfile.TemporaryDirectory(prefix="adaptive-") as scratch:
        model_args, data_args, training_args, finetuning_args, _ = get_train_args(_single_process(args, scratch))
        modules = load_tokenizer(model_args)
        tokenizer = modules["tokenizer"]
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
        stage = "rm" if finetuning_args.stage == "dpo" else finetuning_args.stage
        dataset = get_dataset(template, model_args, data_args, training_args, stage=stage, **modules)["train_dataset"]
        rows = _draw_rows(dataset, config, data_args.streaming)
        model = load_model(tokenizer, model_args, finetuning_args, is_trainable=False)
    return model, rows, tokenizer.pad_token_id or 0


_OTHER_PROCESS = ("deepspeed", "fsdp", "fsdp_config", "resume_from_checkpoint", "report_to")
_TRAINING_ONLY = (*_OTHER_PROCESS, "eval_dataset", "eval_strategy",
                  "load_best_model_at_end", "metric_for_best_model", "push_to_hub", "do_eval", "do_predict",
                  "predict_with_generate", "early_stopping_steps", "overwrite_output_dir", "ref_model",
                  "ref_model_adapters", "use_swanlab", "plot_loss", "save_on_each_node", "eval_steps")  # fmt: skip


def _single_process(args: Args, scratch: str) -> Args:
    """The run's settings, reduced to loading the base model and the training split in one process."""
    dropped = {*_TRAINING_ONLY, *our_keys(args)}
    kept = {key: value for key, value in args.items() if key not in dropped}
    if not args.get("create_new_adapter"):
        kept.pop("adapter_name_or_path", None)
    kept["dataset"] = ",".join(calibration_names(args)) or None
    if set(calibration_names(args)) != set(split_names(args.get("dataset"))):
        for key in ("interleave_probs", "mix_strategy", "val_size"):  # they speak of the training set
            kept.pop(key, None)
    if not uses_tokenized_folder(args):
        kept.pop("tokenized_path", None)  # the host would write it, without the run's evaluation set
    # Rows are scored one by one: packing would add padding that counts, and attention across rows.
    forced = {
        "finetuning_type": "lora",
        "do_train": True,
        "report_to": "none",
        "packing": False,
        "neat_packing": False,
    }
    return kept | forced | {"output_dir": scratch}


def _draw_rows(dataset: Any, config: AdaptiveConfig, streaming: bool) -> list[dict[str, list[int]]]:
    """A seeded draw of calibration rows as token ids and labels, whatever the stage calls them."""
    seed, wanted = config.calibration.seed, config.calibration.samples
    if streaming:
        picked: Iterable[Any] = islice(dataset.shuffle(seed=seed, buffer_size=max(1000, 4 * wanted)), wanted)
    else:
        indices = random.Random(seed).sample(range(len(dataset)), min(wanted, len(dataset)))
        picked = (dataset[index] for index in sorted(indices))
    rows = []
    for sample in picked:
        if any(sample.get(key) for key in ("images", "videos", "audios")):
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
