"""Merging into the base shard by shard, bit for bit as PEFT's ``merge_and_unload`` does it on a CPU.

PEFT computes ``W += (B @ A) * scale`` in place: the product in fp32 (it loads 16-bit factors in fp32), the sum in fp32
too, rounded once to the weight's type. The same operations in the same order give the same bits. Only one weight is in
memory at a time; shards keep their names and hold the same weights as before.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.export.base_checkpoint import INDEX_FILE, BaseCheckpoint, tied_weights
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.safetensors_stream import TensorSpec, read_specs, write_streaming
from llamafactory_adaptive.export.source_adapter import SourceAdapter
from llamafactory_adaptive.progress import progress


Transform = Callable[[str, Tensor], Tensor]


def update(adapter: SourceAdapter, name: str) -> Tensor:
    """Compute what the adapter adds to a module's weight: scale * B A in fp32, (d_out, d_in)."""
    a, b = adapter.factors(name)
    return (b.float() @ a.float()) * adapter.by_name[name].scale


def only_dtype(base: BaseCheckpoint) -> torch.dtype:
    """Return the one type that all floating-point weights of the base have.

    Raises:
        AdaptiveConfigError: they have several; PEFT would merge in one of them, and the user has to choose which.
    """
    if len(base.dtypes) == 1:
        return next(iter(base.dtypes))
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in base.dtypes))
    why = f"the weights of {base.name} are of several types ({names}), a merged model has one"
    suggestion = "--dtype bfloat16" if torch.bfloat16 in base.dtypes else "--dtype float16"
    refuse("dtype", "auto", why, suggestion)


def check_replaced(adapter: SourceAdapter, base: BaseCheckpoint, skeleton: nn.Module) -> None:
    """Check that each fully trained weight of the adapter replaces exactly one weight of the base.

    Raises:
        AdaptiveConfigError: a weight is tied to another one, or the base has none of that name and shape.
    """
    tied = tied_weights(skeleton)
    for name, key in adapter.replaced.items():
        if name in tied:
            why = f"{name} is tied to another weight, and the adapter has its own"
        elif name not in base.weights or base.tensor(name).shape != adapter.tensor(key).shape:
            why = f"the base has no {name} of shape {tuple(adapter.tensor(key).shape)}"
        else:
            continue
        saved = adapter.config.get("modules_to_save")
        refuse("modules_to_save", saved, why, "`llamafactory-cli export`")


def merge(
    adapter: SourceAdapter,
    base: BaseCheckpoint,
    target: Path,
    dtype: torch.dtype,
    prepare: Transform = lambda name, weight: weight,
) -> None:
    """Write the merged weights to ``target``, shard by shard.

    Args:
        dtype: type of floating-point weights.
        prepare: applied to each weight (in the final type) before the update is added.
    """
    adapted = {f"{module.name}.weight": module.name for module in adapter.modules}

    def make(spec: TensorSpec, weight: Tensor) -> Tensor:
        weight = weight.to(spec.dtype)
        if spec.name in adapter.replaced:
            return adapter.tensor(adapter.replaced[spec.name]).to(spec.dtype)
        weight = prepare(spec.name, weight)
        if spec.name not in adapted:
            return weight
        return _added(spec.name, weight, update(adapter, adapted[spec.name]))

    with progress("merging weights", len(base.weights)) as advance:
        total = sum(_merge_shard(path, target / path.name, dtype, make, advance) for path in base.shards)
    if len(base.shards) > 1:
        _write_index(base, target, total)


def _added(name: str, weight: Tensor, change: Tensor) -> Tensor:
    """Add a module's update to its weight; the error for a result that is not finite names the cause."""
    merged = weight.clone().add_(change)
    if bool(torch.isfinite(merged).all()):
        return merged
    if not bool(torch.isfinite(weight).all()):
        raise ExportError(f"{name} of the base holds NaN or infinity as {weight.dtype}; take another copy or --dtype")
    raise ExportError(f"{name} would leave the range of {weight.dtype} when merged; merge with --dtype bfloat16")


def _merge_shard(
    source: Path,
    target: Path,
    dtype: torch.dtype,
    make: Callable[[TensorSpec, Tensor], Tensor],
    advance: Callable[[], None],
) -> int:
    """Write one merged shard and return the size of its weights in bytes."""
    specs = [_retyped(spec, dtype) for spec in read_specs(source)]
    with safe_open(source, framework="pt") as file:

        def next_weight(spec: TensorSpec) -> Tensor:
            advance()
            return make(spec, file.get_tensor(spec.name))

        write_streaming(target, specs, next_weight)
    return sum(spec.bytes for spec in specs)


def merged_bytes(base: BaseCheckpoint, dtype: torch.dtype) -> int:
    """Compute the size of the merged weights on disk, in bytes."""
    return sum(_retyped(spec, dtype).bytes for path in base.shards for spec in read_specs(path))


def _retyped(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    return TensorSpec(spec.name, dtype, spec.shape) if spec.dtype.is_floating_point else spec


def _write_index(base: BaseCheckpoint, target: Path, total: int) -> None:
    document = {
        "metadata": {"total_size": total},
        "weight_map": {name: path.name for name, path in sorted(base.weights.items())},
    }
    (target / INDEX_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def set_dtype(target: Path, dtype: torch.dtype) -> None:
    """Set the type in the copied ``config.json`` to that of the merged weights, since servers load by it."""
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    path.write_text(json.dumps({**config, key: str(dtype).removeprefix("torch.")}, indent=2) + "\n", encoding="utf-8")
