"""Facts and digests that identify the model and data of a run."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from llamafactory_adaptive.bridge.arguments import Args, run_seed, split_names
from llamafactory_adaptive.bridge.target_shapes import calibration_rows
from llamafactory_adaptive.files import digest_of, file_digest, read_mapping
from llamafactory_adaptive.versions import installed_versions


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


_HASHED_WHOLE = 64 * 2**20


def identity(args: Args) -> dict[str, Any]:
    """Collect everything that determines the statistics: weights, token rows, precision and versions, JSON-able."""
    from llamafactory.hparams import DataArguments, ModelArguments

    groups = {f.name for owner in (ModelArguments, DataArguments) for f in dataclasses.fields(owner) if f.init}
    keys = (groups - _NO_INFLUENCE) | set(_TRAINING_INFLUENCE)
    settings = {key: args[key] for key in sorted(keys) if args.get(key) is not None}
    if args.get("create_new_adapter"):  # merged into the base before scoring
        settings["merged"] = [_fingerprint(Path(p)) for p in split_names(args.get("adapter_name_or_path"))]
    return {
        "settings": settings,
        "model": _fingerprint(_model_path(args)),
        "data": _data_fingerprint(args),
        "versions": _versions(),
    }


def model_digest(args: Args) -> str:
    """Compute the digest of what the model's files hold, the same for a copy; of its name where it has none here.

    Every byte is read: about a second a gigabyte.
    """
    return digest_of(_fingerprint(_model_path(args), hashed=math.inf))


def data_digest(args: Args) -> str:
    """Compute the digest of what the data files hold that calibration rows are drawn from, every byte of them read."""
    return digest_of(_data_fingerprint(args, hashed=math.inf))


def _model_path(args: Args) -> Path:
    return Path(os.path.expanduser(str(args["model_name_or_path"])))  # "~nobody" is no error


def _fingerprint(path: Path, hashed: float = _HASHED_WHOLE) -> Any:
    """Identify a local file or folder, a hub name by itself (its revision is among the settings).

    Args:
        hashed: size in bytes up to which a file is known by its content; larger ones are by size and time.
    """
    if path.is_dir():
        files = {file.relative_to(path): file for file in sorted(path.rglob("*")) if file.is_file()}
        # What tools keep in hidden folders, such as the times of downloads, is not part of a model or of data.
        seen = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)}
        return {str(name): _fingerprint(file, hashed) for name, file in seen.items()}
    if not path.is_file():
        return str(path)
    facts = path.stat()
    return file_digest(path) if facts.st_size <= hashed else [facts.st_size, facts.st_mtime_ns]


def _data_fingerprint(args: Args, hashed: float = _HASHED_WHOLE) -> Any:
    """Identify the data that calibration rows are drawn from."""
    rows = calibration_rows(args)
    if rows.folder is not None:
        return _fingerprint(rows.folder, hashed)
    given = args.get("dataset_dir") or "data"
    folder = Path() if isinstance(given, dict) else Path(str(given))
    info_path = folder / "dataset_info.json"
    if not isinstance(given, dict) and not info_path.is_file():
        return None
    info = given if isinstance(given, dict) else read_mapping(info_path, str(info_path), finite=False)
    entries = {name: info.get(name) for name in rows.names}
    files = [folder / str(entry["file_name"]) for entry in entries.values() if entry and "file_name" in entry]
    return {"entries": entries, "files": [_fingerprint(path, hashed) for path in files]}


def _versions() -> dict[str, str]:
    return installed_versions(("torch", "transformers", "llamafactory", "bitsandbytes", "llamafactory-adaptive"))


def _architecture(model: str) -> str | None:
    """Return the class name in the base model's own config; None where that cannot be read here."""
    from transformers import PretrainedConfig

    try:
        names = PretrainedConfig.get_config_dict(model)[0].get("architectures")
    except (OSError, ValueError):
        return None
    return str(names[0]) if isinstance(names, list) and names else None


def provenance(args: Args) -> dict[str, Any]:
    """Collect what a plan records of its origin: base model, calibration data, seed and versions."""
    return {
        "base_model": str(args["model_name_or_path"]),
        "architecture": _architecture(str(args["model_name_or_path"])),
        "quantization_bit": args.get("quantization_bit"),
        "calibration_dataset": calibration_rows(args).names,
        "seed": run_seed(args),
        "versions": _versions(),
    }
