"""The host's model and data: target shapes without weights, and measurements in a process of their own."""

import dataclasses
import hashlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, local_rank, run_seed, split_names
from llamafactory_adaptive.errors import AdaptiveConfigError, PlanError, Problem
from llamafactory_adaptive.files import read_json, read_mapping
from llamafactory_adaptive.plan import ModuleShape


logger = logging.getLogger("llamafactory.adaptive")
# Settings of the model and data groups that change neither weights nor token rows.
_NO_INFLUENCE = {
    "preprocessing_num_workers", "preprocessing_batch_size", "overwrite_cache", "print_param_status", "cache_dir",
    "data_shared_file_system", "eval_dataset", "eval_on_each_dataset", "eval_num_beams", "infer_backend",
    "export_dir", "export_size", "export_device", "use_cache", "hf_hub_token", "ms_hub_token", "om_hub_token",
    "adapter_name_or_path", "disable_gradient_checkpointing", "flash_attn", "tokenized_path",
}  # fmt: skip
_TRAINING_INFLUENCE = (
    "stage",
    "seed",
    "bf16",
    "fp16",
    "pure_bf16",
    "create_new_adapter",
    "lora_target",
    "additional_target",
    "freeze_vision_tower",
    "use_llama_pro",
    "freeze_trainable_layers",
)
_HASHED_WHOLE = 64 * 2**20  # larger files are identified by size and time


def target_shapes(args: Args) -> list[ModuleShape]:
    """Name and size of every module that LoRA would adapt, from the model's config alone: no weights are read.

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
            raise AdaptiveConfigError(
                [
                    Problem(
                        "lora_target",
                        ",".join(targets),
                        f"{name} is a {type(module).__name__}, not a linear layer",
                        "lora_target: all (and additional_target for embeddings)",
                    )
                ]
            )
        shapes.append(ModuleShape(name, module.in_features, module.out_features))
    _tell_of_fused_experts(model)
    if not shapes:
        _refuse_conv1d(model)
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise AdaptiveConfigError(
            [
                Problem(
                    "lora_target",
                    ",".join(targets),
                    "no module of the model has such a name",
                    "lora_target: all, or some of " + ",".join(names),
                )
            ]
        )
    return shapes


_told: set[str] = set()


def _tell_of_fused_experts(model: Any) -> None:
    """Say once that experts kept in one tensor get no adapter, as plain LoRA gives them none."""
    fused = [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name]
    if fused and local_rank() == 0 and "fused" not in _told:
        _told.add("fused")
        logger.warning(
            f"{len(fused)} weights hold the experts of a layer in one tensor ({fused[0]}, ...) and get no adapter: "
            "ranks are shared among the other modules"
        )


def _refuse_conv1d(model: Any) -> None:
    """Refuse a model whose layers are transposed, as in GPT-2, by that name.

    Raises:
        AdaptiveConfigError: nothing in it can be adapted.
    """
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        reason = "the layers of this model are of type Conv1D, and ranks are planned for nn.Linear alone"
        raise AdaptiveConfigError(
            [Problem("model_name_or_path", type(model).__name__, reason, "finetuning_type: lora")]
        )


def estimated_steps(args: Args) -> int | None:
    """Estimate the optimizer steps of a run from its epochs and local rows; None where rows cannot be counted.

    Rows that the template or ``cutoff_len`` drops, and packing, are not foreseen.
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
    if not all(number.isdecimal() and int(number) for number in numbers):  # torchrun knows more words than numbers
        return None
    processes = math.prod(map(int, numbers))
    batch = int(args.get("per_device_train_batch_size") or 8) * processes
    batches = math.ceil(rows / batch)
    steps = math.ceil(batches / int(args.get("gradient_accumulation_steps") or 1))
    return math.ceil(steps * float(args.get("num_train_epochs") or 3.0)) or None


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


def _skeleton(args: Args) -> tuple[Any, list[str], Any]:
    """The model on the meta device and the target names, found by the host's own rules."""
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
        config = load_config(model_args)
    except (OSError, ValueError) as error:
        problem = Problem("model_name_or_path", args["model_name_or_path"], f"its config cannot be loaded ({error})",
                          "a folder with a config.json, or a hub name")  # fmt: skip
        raise AdaptiveConfigError([problem]) from error
    image_text = transformers.AutoModelForImageTextToText
    loader = image_text if type(config) in image_text._model_mapping else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(config, trust_remote_code=model_args.trust_remote_code)
    targets = finetuning_args.lora_target
    if targets == ["all"]:
        targets = find_all_linear_modules(model, finetuning_args.freeze_vision_tower)
    if finetuning_args.use_llama_pro:
        targets = find_expanded_modules(model, targets, finetuning_args.freeze_trainable_layers)
    return model, sorted(patch_target_modules(model, finetuning_args, targets)), finetuning_args


def identity(args: Args) -> dict[str, Any]:
    """Everything that determines the statistics: weights, token rows, precision and versions, JSON-able."""
    from llamafactory.hparams import DataArguments, ModelArguments

    groups = {f.name for owner in (ModelArguments, DataArguments) for f in dataclasses.fields(owner) if f.init}
    keys = (groups - _NO_INFLUENCE) | set(_TRAINING_INFLUENCE)
    settings = {key: args[key] for key in sorted(keys) if args.get(key) is not None}
    if args.get("create_new_adapter"):  # merged into the base before scoring
        settings["merged"] = [_fingerprint(Path(p)) for p in split_names(args.get("adapter_name_or_path"))]
    return {
        "settings": settings,
        "model": _fingerprint(Path(os.path.expanduser(str(args["model_name_or_path"])))),
        "data": _data_fingerprint(args),
        "versions": _versions(),
    }


def _fingerprint(path: Path) -> Any:
    """Identify a local file or folder; a hub name stands for itself (with ``model_revision`` among the settings)."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): _fingerprint(file) for file in files}
    if not path.is_file():
        return str(path)
    facts = path.stat()
    if facts.st_size <= _HASHED_WHOLE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return [facts.st_size, facts.st_mtime_ns]


def _data_fingerprint(args: Args) -> Any:
    """Identify what the calibration rows are drawn from, by the same choice that ``_single_process`` makes."""
    if uses_tokenized_folder(args):
        return _fingerprint(Path(args["tokenized_path"]))
    given = args.get("dataset_dir") or "data"
    folder = Path() if isinstance(given, dict) else Path(str(given))
    info_path = folder / "dataset_info.json"
    if not isinstance(given, dict) and not info_path.is_file():
        return None
    info = given if isinstance(given, dict) else json.loads(info_path.read_text(encoding="utf-8"))
    entries = {name: info.get(name) for name in calibration_names(args)}
    files = [folder / str(entry["file_name"]) for entry in entries.values() if entry and "file_name" in entry]
    return {"entries": entries, "files": [_fingerprint(path) for path in files]}


def calibration_names(args: Args) -> list[str]:
    """Names of the data sets that scores are drawn from."""
    return split_names(args.get("adaptive_calibration_dataset")) or split_names(args.get("dataset"))


def uses_tokenized_folder(args: Args) -> bool:
    """Whether rows come from a tokenised folder that exists; one that does not is for the run itself to write."""
    path = args.get("tokenized_path")
    return bool(
        path and not args.get("adaptive_calibration_dataset") and Path(path).is_dir() and any(Path(path).iterdir())
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "llamafactory", "bitsandbytes",
                                             "llamafactory-adaptive")}  # fmt: skip


def _architecture(model: str) -> str | None:
    """Class name in the base model's own config; None where that cannot be read here."""
    from transformers import PretrainedConfig

    try:
        names = PretrainedConfig.get_config_dict(model)[0].get("architectures")
    except (OSError, ValueError):
        return None
    return str(names[0]) if isinstance(names, list) and names else None


def provenance(args: Args) -> dict[str, Any]:
    """What a reader of the plan wants to know about where it came from."""
    return {
        "base_model": str(args["model_name_or_path"]),
        "architecture": _architecture(str(args["model_name_or_path"])),
        "quantization_bit": args.get("quantization_bit"),
        "calibration_dataset": calibration_names(args),
        "seed": run_seed(args),
        "versions": _versions(),
    }
