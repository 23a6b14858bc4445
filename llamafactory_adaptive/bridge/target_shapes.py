"""Target modules and their shapes, from the host's model built without weights."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llamafactory_adaptive.api.targets import tell_of_fused_experts
from llamafactory_adaptive.bridge.arguments import Args, split_names
from llamafactory_adaptive.errors import PlanError, refuse
from llamafactory_adaptive.files import read_json, read_mapping
from llamafactory_adaptive.ranks.module_names import module_type
from llamafactory_adaptive.ranks.plan import ModuleShape


logger = logging.getLogger("llamafactory.adaptive")


def target_shapes(args: Args) -> list[ModuleShape]:
    """List name and size of every module that LoRA would adapt, from the model's config alone: no weights are read.

    Raises:
        AdaptiveConfigError: ``lora_target`` matches nothing, or something that is no linear layer.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    model, targets, finetuning_args = _skeleton(args)
    extra = finetuning_args.additional_target
    matcher = LoraConfig(target_modules=targets, modules_to_save=extra)
    shapes = []
    for name, module in model.named_modules():
        if check_target_module_exists(matcher, name) is not True:
            continue
        if not isinstance(module, torch.nn.Linear):
            refuse(
                "lora_target",
                ",".join(targets),
                f"{name} is a {type(module).__name__}, not a linear layer",
                "lora_target: all (and additional_target for embeddings)",
            )
        shapes.append(ModuleShape(name, module.in_features, module.out_features))
    tell_of_fused_experts(model)
    if not shapes:
        _refuse_conv1d(model)
        names = sorted({module_type(n) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        refuse(
            "lora_target",
            ",".join(targets),
            "no module of the model has such a name",
            "lora_target: all, or some of " + ",".join(names),
        )
    return shapes


def _refuse_conv1d(model: Any) -> None:
    """Refuse a model whose layers are of type Conv1D, which are transposed, as in GPT-2.

    Raises:
        AdaptiveConfigError: the model has such layers.
    """
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        reason = "the layers of this model are of type Conv1D, and ranks are planned for nn.Linear alone"
        refuse("model_name_or_path", type(model).__name__, reason, "finetuning_type: lora")


def estimated_epoch_steps(args: Args) -> int | None:
    """Estimate the optimizer steps of an epoch from local rows; None where rows cannot be counted.

    Rows that the template or ``cutoff_len`` drops are counted as well.
    """
    given = args.get("dataset_dir") or "data"
    path = Path() if isinstance(given, dict) else Path(str(given)) / "dataset_info.json"
    if isinstance(given, dict) or not path.is_file() or args.get("packing") or args.get("streaming"):
        return None
    info, rows = read_mapping(path, str(path)), 0
    for name in split_names(args.get("dataset")):
        count = _count_rows(path.parent / str(info.get(name, {}).get("file_name", "")))
        if count is None:
            return None
        rows += min(count, int(args.get("max_samples") or count))
    held_out = float(args.get("val_size") or 0)
    rows -= int(held_out) if held_out >= 1 else int(rows * held_out)
    numbers = [os.environ.get(name, "1") for name in ("NPROC_PER_NODE", "NNODES")]
    if not all(number.isdecimal() and int(number) for number in numbers):  # torchrun takes words like gpu, too
        return None
    processes = math.prod(map(int, numbers))
    batch = int(args.get("per_device_train_batch_size") or 8) * processes
    batches = math.ceil(rows / batch)
    return math.ceil(batches / int(args.get("gradient_accumulation_steps") or 1)) or None


def estimated_steps(args: Args) -> int | None:
    """Estimate the optimizer steps of a run from its epochs and local rows; None where rows cannot be counted."""
    steps = estimated_epoch_steps(args)
    return steps and math.ceil(steps * epochs(args))


def epochs(args: Args) -> float:
    """Return the number of epochs that a run asks for; of no effect where ``max_steps`` is set."""
    return float(args.get("num_train_epochs") or 3.0)


def _count_rows(path: Path) -> int | None:
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    if path.suffix == ".json" and path.is_file():
        try:
            document = read_json(path, str(path), finite=False)
        except PlanError:
            return None
        return len(document) if isinstance(document, list) else None
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing the model's configuration, which the host prints when it loads the model."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(max(before, transformers_logging.WARNING))
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _skeleton(args: Args) -> tuple[Any, list[str], Any]:
    """Build the model on the meta device; return it with the target names by the host's rules, and its arguments."""
    import torch
    import transformers
    from llamafactory.hparams import ModelArguments
    from llamafactory.hparams import parser as host
    from llamafactory.model import load_config
    from llamafactory.model.model_utils.misc import find_all_linear_modules, find_expanded_modules
    from llamafactory.model.model_utils.visual import patch_target_modules
    from transformers import HfArgumentParser

    finetuning_class = next(c for c in host._TRAIN_ARGS if c.__name__ == "FinetuningArguments")
    parser = HfArgumentParser([ModelArguments, finetuning_class])
    model_args, finetuning_args = parser.parse_dict(args, allow_extra_keys=True)
    try:
        with _quiet():
            config = load_config(model_args)
    except (OSError, ValueError) as error:
        refuse(
            "model_name_or_path",
            args["model_name_or_path"],
            f"its config cannot be loaded ({error})",
            "a folder with a config.json, or a hub name",
            cause=error,
        )
    image_text = transformers.AutoModelForImageTextToText
    loader = image_text if type(config) in image_text._model_mapping else transformers.AutoModelForCausalLM
    with torch.device("meta"), _quiet():
        model = loader.from_config(config, trust_remote_code=model_args.trust_remote_code)
    targets = finetuning_args.lora_target
    if targets == ["all"]:
        targets = find_all_linear_modules(model, finetuning_args.freeze_vision_tower)
    if finetuning_args.use_llama_pro:
        targets = find_expanded_modules(model, targets, finetuning_args.freeze_trainable_layers)
    return model, sorted(patch_target_modules(model, finetuning_args, targets)), finetuning_args


class CalibrationRows(NamedTuple):
    """Where the rows come from that modules are scored on.

    Attributes:
        folder: the tokenised folder, if rows come from one that exists; a missing one is written by the run itself.
        names: the data sets, of which the rows are drawn without a folder: those for calibration, else for training.
    """

    folder: Path | None
    names: list[str]


def calibration_rows(args: Args) -> CalibrationRows:
    """Choose where calibration rows come from, for the scoring process and for what identifies its data."""
    named = split_names(args.get("adaptive_calibration_dataset"))
    folder = Path(args["tokenized_path"]) if args.get("tokenized_path") and not named else None
    there = folder is not None and folder.is_dir() and any(folder.iterdir())
    return CalibrationRows(folder if there else None, named or split_names(args.get("dataset")))
