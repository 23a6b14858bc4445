"""The files of the base model: where they are, which shard holds which weight, and whether an adapter fits."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llamafactory_adaptive.errors import AdaptiveConfigError, first_of, refuse
from llamafactory_adaptive.export.adapter_config import ELSEWHERE
from llamafactory_adaptive.export.faults import (
    ExportError,
    first_line,
    loading_fault,
    read_untrusted,
    refuse_entries_outside,
)
from llamafactory_adaptive.export.folder_links import OutsideError, entries_inside, inside, open_inside
from llamafactory_adaptive.export.safetensors_stream import read_specs
from llamafactory_adaptive.export.source_adapter import SourceAdapter
from llamafactory_adaptive.files import could_not_write


INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
# What a checkpoint has beside its weights; nothing that could run or be unpickled.
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")
_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
                    "chat_template*", "additional_chat_templates/*.jinja")  # fmt: skip


@dataclass(frozen=True)
class BaseCheckpoint:
    """A 16-bit (or 32-bit) checkpoint in a local folder.

    Attributes:
        name: the name that the user or the adapter gives: a folder or a hub name.
        weights: file of each weight, by its name.
    """

    name: str
    folder: Path
    weights: Mapping[str, Path]

    @property
    def shards(self) -> list[Path]:
        """Return the files with weights, sorted."""
        return sorted(set(self.weights.values()))

    @cached_property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Return the types of floating-point weights in the files, whatever ``config.json`` says."""
        return frozenset(dtype for dtype in self.dtype_of.values() if dtype.is_floating_point)

    @cached_property
    def dtype_of(self) -> dict[str, torch.dtype]:
        """Map each weight's name to its type in the files."""
        return {spec.name: spec.dtype for path in self.shards for spec in read_specs(path)}

    @property
    def widest(self) -> torch.dtype:
        """Return the narrowest type that holds every floating-point weight exactly."""
        return reduce(torch.promote_types, self.dtypes)

    def skeleton(self) -> nn.Module:
        """Build the model without its weights, on the meta device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            with torch.device("meta"):
                config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
                model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return model
        except Exception as error:  # whatever a config from elsewhere makes of transformers' own code
            why = f"it is no causal language model that transformers loads by itself ({loading_fault(error)})"
            refuse("base", self.name, why, "`llamafactory-cli export`", cause=error)

    def tensor(self, name: str) -> Tensor:
        """Read one weight by name."""
        with safe_open(self.weights[name], framework="pt") as file:
            weight: Tensor = file.get_tensor(name)
        return weight


def find_base(name: str | None, adapter: SourceAdapter) -> BaseCheckpoint:
    """Find the base of an adapter: ``name``, or the one in its config; a folder, or a name on the hub.

    Raises:
        AdaptiveConfigError: the base is missing, quantised, not saved as safetensors, or cannot be read.
    """
    name = name or adapter.config.get("base_model_name_or_path")
    if not name:
        refuse("base", None, "the adapter's config names no base model", "--base <folder>")
    folder = Path(name) if _is_folder(name) else _from_hub(name)
    if not (folder / "config.json").is_file():
        refuse("base", name, "it has no config.json", "the folder of a checkpoint")
    refuse_entries_outside(folder, "base")
    config = read_untrusted(folder, "config.json", "base")
    if config.get("quantization_config"):
        refuse("base", name, "it is quantised", "--base <the 16-bit checkpoint it came from>")
    try:
        weights = _weight_map(folder, name)
        _check_layers(config, len(weights))
        return BaseCheckpoint(name, folder, weights)
    except AdaptiveConfigError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        why = f"its files cannot be read ({first_line(error)})"
        refuse("base", name, why, "a complete copy of a 16-bit checkpoint", cause=error)


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # no name that a folder could have
        return False


def _check_layers(config: Mapping[str, Any], weights: int) -> None:
    """Check that there is at least one weight per layer: a made-up number of layers would take for ever to build.

    Raises:
        ValueError: there are fewer weights than layers.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            count = part.get(key)
            if isinstance(count, (int, float)) and count > weights:
                raise ValueError(f"config.json has {key} {count}, there are {weights} weights")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["model*.safetensors", *SIDE_FILES]))
    except (OSError, ValueError) as error:
        why = f"it is no folder here and cannot be had from the hub ({first_line(error)})"
        refuse("base", name, why, "--base <folder of the checkpoint>", cause=error)


def _weight_map(folder: Path, name: str) -> dict[str, Path]:
    """Map each weight's name to its file by the headers of the files, which also shows whether they are complete."""
    index = folder / INDEX_FILE
    if index.is_file():
        files = _files_of(read_untrusted(folder, INDEX_FILE, "base"))
    elif (folder / WEIGHTS_FILE).is_file():
        files = [WEIGHTS_FILE]
    else:
        why = "it has no weights as safetensors (pickled ones are not opened)"
        refuse("base", name, why, "a checkpoint saved with safe_serialization")
    if missing := [file for file in files if not inside(folder, file).is_file()]:
        refuse("base", name, f"{missing[0]} is missing", "a complete copy of the checkpoint")
    return {spec.name: path for path in (inside(folder, file) for file in files) for spec in read_specs(path)}


def _files_of(index: Mapping[str, Any]) -> list[str]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{INDEX_FILE} has no weight_map of file names")
    return sorted(set(places.values()))


def tied_weights(skeleton: nn.Module) -> set[str]:
    """Return the names of tied weights (output head and embeddings)."""
    pairs: dict[str, str] = getattr(skeleton, "all_tied_weights_keys", {})
    return set(pairs) | set(pairs.values())


def check_fit(adapter: SourceAdapter, base: BaseCheckpoint, skeleton: nn.Module) -> None:
    """Check that every adapted layer is a linear layer of the base, of the same sizes, with a weight of its own.

    Raises:
        AdaptiveConfigError: naming the first layers that do not fit.
    """
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    faults, suggestion = [], ELSEWHERE
    for module in adapter.modules:
        linear = linears.get(module.name)
        if linear is None or (linear.in_features, linear.out_features) != (module.in_features, module.out_features):
            suggestion = "--base <the model it was trained on>"
        if linear is None:
            faults.append(f"{module.name} is no linear layer of it")
        elif (linear.in_features, linear.out_features) != (module.in_features, module.out_features):
            faults.append(
                f"{module.name} is {linear.in_features}x{linear.out_features} there and "
                f"{module.in_features}x{module.out_features} in the adapter"
            )
        elif f"{module.name}.weight" not in base.weights:
            tied = f"{module.name}.weight" in tied_weights(skeleton)
            why = "is tied to the embeddings" if tied else "is saved there under another name"
            faults.append(f"{module.name} {why}")
        elif not (dtype := base.dtype_of[f"{module.name}.weight"]).is_floating_point:
            suggestion = "--base <the 16-bit checkpoint it came from>"
            faults.append(f"{module.name} is held as {dtype} there")
    if faults:
        refuse("base", base.name, f"the adapter does not fit: {first_of(faults)}", suggestion)


def copy_side_files(base: BaseCheckpoint, adapter: Path, target: Path) -> None:
    """Copy configs and generation settings of the base, and the tokenizer, with chat template, that training saved.

    LLaMA-Factory saves the tokenizer beside the adapter, set up for the template that was trained; without one there,
    that of the base is copied.

    Raises:
        ExportError: an entry leads out of its folder, has become a link since it was checked, or is gone.
    """
    try:
        for name, folder in _side_files(base.folder, adapter).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with open_inside(folder, name.as_posix()) as source, (target / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
    except (OutsideError, OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        if could_not_write(error):
            raise
        raise ExportError(f"the files beside the weights cannot be copied: {first_line(error)}") from error


def _side_files(base: Path, adapter: Path) -> dict[Path, Path]:
    """Map the name of each file that goes beside merged weights to the folder it comes from."""
    names = {path.relative_to(base): base for path in entries_inside(base, *SIDE_FILES)}
    names = {name: folder for name, folder in names.items() if not name.name.endswith(".index.json")}
    if (adapter / "tokenizer_config.json").is_file():
        names = {name: folder for name, folder in names.items() if not any(name.match(p) for p in _TOKENIZER_FILES)}
        names |= {path.relative_to(adapter): adapter for path in entries_inside(adapter, *_TOKENIZER_FILES)}
    return names
