"""Held-out loss of one adapter at several cuts, in a process of its own and without training.

The adapter's components lie in a file in order of importance, so that every cut is a number of first components per
module: the model is loaded once and computes with each of them in turn, over the same rows.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge import measure_process
from llamafactory_adaptive.bridge.arguments import (
    Args,
    check_config_file,
    command_line_settings,
    run_seed,
    split_names,
    to_mapping,
)
from llamafactory_adaptive.bridge.scoring_job import scoring_settings
from llamafactory_adaptive.bridge.validation import names_not_in_info
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.calibration.devices import input_device
from llamafactory_adaptive.config.run_config import CalibrationConfig
from llamafactory_adaptive.errors import CalibrationError, Problem, refuse, refuse_all
from llamafactory_adaptive.files import replacing
from llamafactory_adaptive.planning.compatibility import is_same_base, trained_base
from llamafactory_adaptive.progress import watched
from llamafactory_adaptive.reports.plaintext import tell


_STAGES = ("sft", "pt")
_BATCH_SIZE = 8  # the Trainer's default for evaluations
PROGRESS = "Held-out loss"


@dataclass(frozen=True)
class HeldOutJob:
    """Losses of one adapter at several cuts.

    Attributes:
        settings: the host's settings for loading model and rows.
        part: what the host calls the part of the data that rows are drawn from.
        calibration: number of rows, batch size and the seed of the draw.
        components: safetensors file with A and B of each module, as PEFT saves them, in order of importance.
        scale: factor on B A, the same for every module.
        cuts: per cut, the number of components of each module; the first has all of them.
        path: file for the losses, in an empty folder.
    """

    settings: Args
    part: str
    calibration: CalibrationConfig
    components: Path
    scale: float
    cuts: tuple[Mapping[str, int], ...]
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Encode the job as a mapping of JSON values."""
        paths = {"components": str(self.components), "path": str(self.path)}
        return {**vars(self), **paths, "calibration": asdict(self.calibration), "cuts": list(self.cuts)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "HeldOutJob":
        """Build the job from what :meth:`to_json` returned."""
        paths = {key: Path(values[key]) for key in ("components", "path")}
        calibration = CalibrationConfig(**values["calibration"])
        return cls(**{**values, **paths, "calibration": calibration, "cuts": tuple(values["cuts"])})


def held_out_settings(config: Path, data: str, overrides: Sequence[str] = ()) -> Args:
    """Read a training YAML and check that losses on rows of the data set ``data`` can be taken as it says.

    Args:
        config: the YAML.
        data: names of data sets.
        overrides: settings of the run's command line, each as ``key=value``.

    Raises:
        AdaptiveConfigError: the file cannot be read, or names no model; the data set is unknown or trained on.
    """
    check_config_file(config)
    sys.argv = ["llamafactory-adaptive", str(config), *overrides]  # the host reads its settings from the command line
    args = to_mapping(command_line_settings())
    refuse_all(*_problems(args, data))
    return args


def _problems(args: Args, data: str) -> list[Problem]:
    problems = []
    if not args.get("model_name_or_path"):
        problems.append(Problem("model_name_or_path", None, "it is required", "model_name_or_path: <path>"))
    if (stage := args.get("stage", "sft")) not in _STAGES:
        words = f"the loss of next tokens is that of the stages {' and '.join(_STAGES)}"
        problems.append(Problem("stage", stage, words, "--curve without --data"))
    names = split_names(data)
    trained = [name for name in names if name in split_names(args.get("dataset"))]
    if trained and not _is_split(args, data):
        words = "the YAML trains on it, and its loss says little of rows that are new"
        suggestion = "--data with a data set that was held out, or with all of the YAML's where it has a val_size"
        problems.append(Problem("data", trained[0], words, suggestion))
    return problems + names_not_in_info(args, {"dataset": [], "data": names})


def _is_split(args: Args, data: str) -> bool:
    """Tell whether ``data`` names the training set of which ``val_size`` held rows out."""
    return bool(args.get("val_size")) and set(split_names(data)) == set(split_names(args.get("dataset")))


def check_trained_alike(args: Args, data: str, trained: Mapping[str, Any], named: str | None) -> None:
    """Compare the settings with what an adapter records of its training, and warn of what differs.

    Args:
        args: the settings.
        data: the data set whose loss is taken.
        trained: provenance in the adapter's plan; empty where it has none.
        named: the base model in the adapter's own config.

    Raises:
        AdaptiveConfigError: its plan says that it was trained on another base model.
    """
    ours, planned = str(args["model_name_or_path"]), trained_base(trained)
    if planned and not is_same_base(ours, str(planned)):
        refuse("model_name_or_path", ours, f"the adapter was trained on {planned}", f"model_name_or_path={planned}")
    if not planned and named and not is_same_base(ours, named):
        tell(f"warning: losses are taken with {ours}, and the adapter names {named} as its base model")
    if _is_split(args, data):
        _tell_of_the_split(trained.get("seed"), run_seed(args))


def _tell_of_the_split(trained: Any, ours: int) -> None:
    """Warn where rows that ``val_size`` holds out cannot be those of the run, and say what they depend on."""
    if trained not in (None, ours):
        tell(
            f"warning: the adapter was trained with seed {trained}, and these settings have {ours}: other rows are "
            f"held out than in its run, which trained on some of them; add seed={trained}"
        )
        return
    tell(
        "the rows that val_size held out follow from val_size, seed, dataset and max_samples: where the run had one "
        "of them on its command line, add it here, as in seed=1"
    )


def held_out_job(args: Args, data: str, samples: int, **adapter: Any) -> HeldOutJob:
    """Build the job for rows of the data set ``data``; ``adapter`` holds the fields of the job that are about it.

    Where ``data`` is the training set, they are the rows that ``val_size`` held out of it.
    """
    split = _is_split(args, data)
    # The rows of a split depend on the order of the data sets, which is the YAML's.
    named = {"adaptive_calibration_dataset": None if split else data, "tokenized_path": None}
    batch_size = int(args.get("per_device_eval_batch_size") or _BATCH_SIZE)
    draw = CalibrationConfig(data, samples, batch_size, run_seed(args))
    part = "eval_dataset" if split else "train_dataset"
    return HeldOutJob(scoring_settings({**args, **named}), part, draw, **adapter)


def held_out_losses(job: HeldOutJob) -> tuple[list[list[float]], list[int]]:
    """Run the job in a process of its own; return, per cut, the summed loss of each row, and the tokens of each row.

    Raises:
        CalibrationError: model or rows cannot be loaded, the adapter does not fit the model, or no token takes a loss.
    """
    from safetensors.torch import load_file

    tell(
        f"loading {job.settings['model_name_or_path']} in a process of its own, which makes {len(job.cuts)} passes "
        f"over at most {job.calibration.samples} rows of {job.calibration.dataset}"
    )
    measure_process.run_job(job)
    tensors = load_file(job.path)
    return tensors["losses"].tolist(), tensors["tokens"].tolist()


def run_held_out_job(job: HeldOutJob) -> None:
    """Load model and rows, take the losses, and write them atomically; the work of the other process."""
    import torch
    from safetensors.torch import save_file

    from llamafactory_adaptive.adapter.component_hooks import first_components_applied
    from llamafactory_adaptive.adapter.lora import keep_4bit_unpacked_on_cpu
    from llamafactory_adaptive.calibration.row_losses import row_losses

    model, rows, pad_id = measure_process.load(job.settings, job, job.part)
    keep_4bit_unpacked_on_cpu(model)
    device = input_device(model)
    batches = [batch.to(device) for batch in make_batches(rows, job.calibration.batch_size, pad_id)]
    layers, factors = _placed(job, model)
    by_cut = []
    try:
        for number, ranks in enumerate(job.cuts, 1):
            with first_components_applied(layers, factors, ranks, job.scale):
                title = f"{PROGRESS} {number}/{len(job.cuts)}"
                by_cut.append(row_losses(model, watched(batches, title)))
    except torch.OutOfMemoryError as error:
        size = job.calibration.batch_size
        raise CalibrationError(
            f"out of memory: lower per_device_eval_batch_size (now {size}) or cutoff_len in the YAML"
        ) from error
    losses = torch.stack([pairs[:, 0] for pairs in by_cut])
    tokens = by_cut[0][:, 1].long()
    if not int(tokens.sum()) or not bool(losses.isfinite().all()):
        what = "is not finite" if int(tokens.sum()) else "has no token: every answer lies beyond cutoff_len"
        raise CalibrationError(f"the loss on {job.calibration.dataset} {what}")
    with replacing(job.path) as temporary:
        save_file({"losses": losses.contiguous(), "tokens": tokens}, temporary)


def _placed(job: HeldOutJob, model: Any) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Find the layers that the adapter is for, and read their factors onto their devices.

    Raises:
        CalibrationError: the model has no such layers.
    """
    from safetensors import safe_open

    from llamafactory_adaptive.adapter.lora import TENSOR_PREFIX

    modules, layers, factors = dict(model.named_modules()), {}, {}
    with safe_open(job.components, framework="pt") as file:
        for name in (name for name, rank in job.cuts[0].items() if rank):
            a, b = (file.get_tensor(f"{TENSOR_PREFIX}{name}.lora_{side}.weight") for side in "AB")
            layer = modules.get(name)
            sizes = [getattr(layer, key, None) for key in ("in_features", "out_features")]
            if layer is None or sizes != [a.shape[1], b.shape[0]]:
                raise CalibrationError(
                    f"the adapter is for another model: {name} is {a.shape[1]}x{b.shape[0]} in it, and "
                    f"{'missing' if layer is None else 'x'.join(map(str, sizes))} in "
                    f"{job.settings['model_name_or_path']}"
                )
            device = input_device(layer)
            layers[name], factors[name] = layer, (a.to(device), b.to(device))
    return layers, factors
