"""Checks of the host's own settings: their types and ranges, then its whole parser, before anything is planned.

The host takes a YAML's values as they are, and much of what is wrong fails only when it is used, after a model was
loaded and scored.
"""

import importlib.util
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import flag_parser, own_names, split_names
from llamafactory_adaptive.errors import AdaptiveConfigError, Problem, refuse
from llamafactory_adaptive.files import check_writable
from llamafactory_adaptive.options import coerce, describe_allowed


# Settings that only processes of other kinds read: launched ones, resumed ones, those that report.
OTHER_PROCESS = ("deepspeed", "fsdp", "fsdp_config", "resume_from_checkpoint", "report_to")
# Closed ranges of the host's numbers. ``None``: no bound on that side.
_RANGES: dict[str, tuple[float | None, float | None, str]] = {
    "learning_rate": (0.0, None, "1.0e-4"),
    "num_train_epochs": (0.0, None, "3.0"),
    "per_device_train_batch_size": (1, None, "1"),
    "per_device_eval_batch_size": (1, None, "1"),
    "gradient_accumulation_steps": (1, None, "8"),
    "lora_dropout": (0.0, 0.999, "0.0"),
    "lora_rank": (1, None, "8"),
    "cutoff_len": (1, None, "2048"),
    "seed": (0, 2**32 - 1, "42"),
    "data_seed": (0, 2**32 - 1, "42"),
    "weight_decay": (0.0, None, "0.0"),
    "max_grad_norm": (0.0, None, "1.0"),
    "max_samples": (1, None, "1000"),
    "val_size": (0.0, None, "0.1"),
    "preprocessing_num_workers": (1, None, "4"),
    "dataloader_num_workers": (0, None, "4"),
    "warmup_ratio": (0.0, 1.0, "0.1"),
    "warmup_steps": (0.0, None, "0.1"),
    "save_total_limit": (1, None, "1"),
    "neftune_noise_alpha": (0.0, None, "leaving it out"),
}
# The package behind each word of report_to, where it is not called the same.
_REPORTERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml",
              "clearml": "clearml", "neptune": "neptune", "trackio": "trackio", "swanlab": "swanlab"}  # fmt: skip


def host_value_problems(args: Mapping[str, Any]) -> list[Problem]:
    """Find values of the host's keys that are of the wrong type, out of range, or name a package that is missing."""
    problems, own = [], own_names()
    for action in flag_parser()._actions:
        if action.dest in args and action.dest not in own and not action.choices:
            problems += _value_problem(action.dest, args[action.dest], action.type, bool(action.nargs))
    return problems + _step_problems(args) + _reporter_problems(args)


def _value_problem(key: str, value: Any, kind: Any, several: bool) -> list[Problem]:
    low, high, example = _RANGES.get(key, (None, None, "leaving it out"))
    suggestion = f"{key}: {example}" if key in _RANGES and example != "leaving it out" else "leaving it out"
    if value is None:
        needed = key in _RANGES and key not in ("data_seed", "max_samples", "save_total_limit", "neftune_noise_alpha",
                                                "preprocessing_num_workers")  # fmt: skip
        return [Problem(key, value, "must be a number", suggestion)] if needed else []
    if kind not in (int, float) or (several and isinstance(value, list)):
        return []
    try:
        number = coerce(value, kind)
    except (ValueError, TypeError, OverflowError):
        words = "a whole number" if kind is int else "a finite number"
        return [Problem(key, value, f"must be {words}", suggestion)]
    if (low is not None and number < low) or (high is not None and number > high):
        return [Problem(key, value, f"must be {describe_allowed({'low': low, 'high': high})}", suggestion)]
    return []


def _step_problems(args: Mapping[str, Any]) -> list[Problem]:
    """Find numbers of steps or epochs with which a run would train nothing and save an adapter all the same."""
    try:
        steps = float(args.get("max_steps", -1))
        epochs = float(args.get("num_train_epochs", 1.0))
    except (TypeError, ValueError):
        return []  # reported already
    problems = []
    if steps == 0 or steps < -1:
        reason = "must be at least 1, or -1 to train num_train_epochs"
        problems.append(Problem("max_steps", args["max_steps"], reason, "max_steps: 100"))
    if steps == -1 and epochs == 0:
        problems.append(Problem("num_train_epochs", args["num_train_epochs"], "must be above 0",
                                "num_train_epochs: 3.0"))  # fmt: skip
    return problems


def _reporter_problems(args: Mapping[str, Any]) -> list[Problem]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known = {"all", "none", *_REPORTERS, *INTEGRATION_TO_CALLBACK}
    return [
        Problem("report_to", name, f"must be one of {', '.join(sorted(known))}", "report_to: none")
        for name in split_names(args.get("report_to"))
        if name not in known
    ] + [
        Problem(
            "report_to", name, "its package is not installed", f"pip install {_REPORTERS[name]}, or report_to: none"
        )
        for name in split_names(args.get("report_to"))
        if name in _REPORTERS and importlib.util.find_spec(_REPORTERS[name]) is None
    ]


def check_output(args: Mapping[str, Any]) -> None:
    """Refuse an ``output_dir`` into which nothing can be written, before anything expensive starts.

    Raises:
        AdaptiveConfigError: nothing can be written there; the message gives the reason.
    """
    check_folder("output_dir", Path(str(args["output_dir"])))


def check_folder(key: str, folder: Path) -> None:
    """Refuse a folder, given under ``key``, into which nothing can be written.

    Raises:
        AdaptiveConfigError: nothing can be written there; the message gives the reason.
    """
    if why := check_writable(folder):
        refuse(key, str(folder), f"nothing can be written there ({why})", "a folder of your own")


def check_host_settings(args: Mapping[str, Any]) -> None:
    """Run the whole settings through the host's own parser and checks; no device is touched, nothing is kept on disk.

    For a process that no launcher started: DeepSpeed's own settings are left to the workers.

    Raises:
        AdaptiveConfigError: the host refuses the settings; the message gives its reason.
    """
    from llamafactory.hparams import get_train_args

    kept = {key: value for key, value in args.items() if key not in OTHER_PROCESS} | {"report_to": "none"}
    with tempfile.TemporaryDirectory(prefix="adaptive-") as scratch, _quietly_without_devices():
        try:
            get_train_args({**kept, "output_dir": scratch, "overwrite_output_dir": True})
        except Exception as error:
            raise AdaptiveConfigError([_in_the_hosts_words(error, args)]) from error


def _in_the_hosts_words(error: Exception, args: Mapping[str, Any]) -> Problem:
    """Return the host's refusal as a problem of the first given key that it names."""
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    known = [*args, *(action.dest for action in flag_parser()._actions)]  # what was given first
    spelled = {name.removeprefix("use_"): name for name in reversed(known)} | {name: name for name in known}
    words = [word.lower() for word in re.findall(r"[A-Za-z_]\w+", said)]
    named = [spelled[word] for word in words if word in spelled]
    key = next((name for name in named if name in args), next(iter(named), "settings"))
    return Problem(key, args.get(key), f"LLaMA-Factory refuses it ({said})", "what its message asks for")


@contextmanager
def _quietly_without_devices() -> Iterator[None]:
    """Keep TrainingArguments, within the context, from opening process groups, using accelerators or logging."""
    import torch
    from transformers import TrainingArguments

    def device(arguments: Any) -> torch.device:
        arguments.distributed_state, arguments._n_gpu = None, 0
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if arguments.use_cpu or accelerator is None else accelerator

    original = TrainingArguments.__dict__["_setup_devices"]
    TrainingArguments._setup_devices = property(device)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        TrainingArguments._setup_devices = original
