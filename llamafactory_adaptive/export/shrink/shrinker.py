"""One cut from start to end: read the adapter, choose what stays, write it module by module, certify, rename."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS, contract_arguments, int_if_integral
from llamafactory_adaptive.calibration.factored_svd import FactoredSvd, decompose, singular_values
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.export.layouts import write_config
from llamafactory_adaptive.export.safetensors_stream import TensorSpec, write_streaming
from llamafactory_adaptive.export.scratch import check_new_folder, scratch_folder
from llamafactory_adaptive.export.shrink.certificate import certify
from llamafactory_adaptive.export.shrink.request import ShrinkRequest
from llamafactory_adaptive.export.source_adapter import LoraModule, SourceAdapter, factor_key, read_adapter
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.progress import progress
from llamafactory_adaptive.ranks.component_cuts import AdapterSpectrum, Cut, ModuleSpectrum
from llamafactory_adaptive.ranks.module_names import layer_order
from llamafactory_adaptive.ranks.plan import ModulePlan, ModuleShape, RankPlan, recorded_provenance
from llamafactory_adaptive.versions import installed_versions


METHOD = "shrink"  # in the plan of a cut adapter
_OF_THE_BASE = ("architecture", "quantization_bit")  # what is told on of the plan that the adapter was trained on
_RANKS_TRIED = 256  # as lora_rank, for a whole lora_alpha


@dataclass(frozen=True)
class Decomposition:
    """An adapter that can be cut, with the singular values of all its modules.

    Attributes:
        scale: alpha/r of the cut adapter, the same for every module; where theirs differed, one in the middle.
    """

    adapter: SourceAdapter
    spectrum: AdapterSpectrum
    scale: float


def run_shrink(request: ShrinkRequest) -> str:
    """Cut one adapter to its budget and return the text for the user.

    Raises:
        AdaptiveConfigError: the request is refused, before anything is written.
        ExportError: what was written is not the best adapter of its ranks; nothing is left in the output folder.
    """
    decomposition = read_decomposition(request)
    cut = chosen_cut(request, decomposition.spectrum)
    with scratch_folder(request.out) as folder:
        write_cut(decomposition, cut, folder)
        plan = cut_plan(decomposition, cut, request.budget)
        plan.write(folder / PLAN_FILE)
        checks = certify(decomposition.adapter, cut, plan, folder)
    rslora = bool(decomposition.adapter.config.get("use_rslora"))
    told = [*checks, *_told_of_scales(decomposition.adapter, plan.scale), *_next(request.out, plan, rslora)]
    return "\n".join([_summary(decomposition.spectrum, cut), *told])


def read_decomposition(request: ShrinkRequest) -> Decomposition:
    """Read an adapter and the singular values of its modules, one module at a time.

    Raises:
        AdaptiveConfigError: it cannot be cut, or the output folder is not new.
    """
    check_new_folder(request.out)
    adapter = read_adapter(request.adapter)
    if adapter.replaced or adapter.config.get("modules_to_save"):
        why = "fully trained weights have no rank to cut, and servers that read LoRA factors would lose them"
        suggestion = "an adapter trained without additional_target, or `llamafactory-cli export`"
        refuse("modules_to_save", adapter.config.get("modules_to_save"), why, suggestion)
    modules = []
    with progress("singular values of modules", len(adapter.modules)) as advance:
        for one in sorted(adapter.modules, key=lambda module: layer_order(module.name)):
            values = singular_values(*adapter.factors(one.name), one.scale)
            shape = ModuleShape(one.name, one.in_features, one.out_features)
            modules.append(ModuleSpectrum(shape, one.rank, tuple(values)))
            advance()
    spectrum = AdapterSpectrum(tuple(modules), request.min_rank)
    if spectrum.energy == 0:
        why = "all its updates are zero, so that there is nothing to choose among"
        refuse("adapter", str(request.adapter), why, "an adapter that was trained")
    return Decomposition(adapter, spectrum, _middle_scale(adapter))


def _middle_scale(adapter: SourceAdapter) -> float:
    """Compute the median of alpha/r over the adapter's parameters."""
    by_scale = sorted((one.scale, one.rank * (one.in_features + one.out_features)) for one in adapter.modules)
    passed = list(accumulate(count for _, count in by_scale))
    return next(scale for (scale, _), so_far in zip(by_scale, passed, strict=True) if 2 * so_far >= passed[-1])


def chosen_cut(request: ShrinkRequest, spectrum: AdapterSpectrum) -> Cut:
    """Cut to the budget that was asked for.

    Raises:
        AdaptiveConfigError: the adapter is smaller than it, or its modules cannot be cut that far.
    """
    if request.energy is not None:
        return spectrum.cut_to_energy(request.energy)
    [(key, asked)] = request.budget.items()
    budget = spectrum.uniform(int(asked)) if key == "rank" else int(asked)
    full, least = spectrum.parameters, spectrum.least
    if budget > full:
        most = full // spectrum.uniform(1) if key == "rank" else full
        words = f"it costs {budget:,} parameters, and the adapter has {full:,}"
        refuse(key, asked, words, f"--{key} {most}" if most else f"--parameters {full}")
    if budget < least:
        floor = (
            f"rank {request.min_rank} in every module costs" if request.min_rank else "the least that can be kept has"
        )
        suggestion = f"--parameters {least}" + (", or --min-rank 0" if request.min_rank else "")
        refuse(key, asked, f"it allows {budget:,} parameters, and {floor} {least:,}", suggestion)
    return spectrum.cut(budget)


def write_cut(decomposition: Decomposition, cut: Cut, target: Path) -> None:
    """Write the adapter cut to these ranks, in fp32, with no more than one module in memory."""
    adapter, scale = decomposition.adapter, decomposition.scale
    ranks = {name: rank for name, rank in cut.by_name().items() if rank}
    write_config(adapter.config.get("base_model_name_or_path"), target, contract_arguments(ranks, scale))
    factors = {factor_key(name, side): (name, side) for name in ranks for side in "AB"}

    @lru_cache(maxsize=1)  # A and B of a module follow each other in the file
    def components(name: str) -> FactoredSvd:
        return decompose(*adapter.factors(name), adapter.by_name[name].scale)

    def make(spec: TensorSpec) -> Tensor:
        advance()
        name, side = factors[spec.name]
        a, b = components(name).factors(ranks[name], scale)
        return (a if side == "A" else b).float()

    specs = [_spec(key, adapter.by_name[name], side, ranks[name]) for key, (name, side) in factors.items()]
    with progress("writing factors", len(specs)) as advance:
        write_streaming(target / ADAPTER_WEIGHTS, specs, make)


def _spec(key: str, module: LoraModule, side: str, rank: int) -> TensorSpec:
    shape = (rank, module.in_features) if side == "A" else (module.out_features, rank)
    return TensorSpec(key, torch.float32, shape)


def cut_plan(decomposition: Decomposition, cut: Cut, asked: Mapping[str, Any]) -> RankPlan:
    """Build the plan of a cut adapter: its ranks, and as score of each module its squared singular values."""
    spectrum, total = decomposition.spectrum, decomposition.spectrum.energy
    modules = tuple(
        ModulePlan(
            one.shape.name, one.shape.in_features, one.shape.out_features, rank,
            score=one.energy, share=one.energy / total, metrics={"lost_energy": one.energy_from(rank)},
        )
        for one, rank in zip(spectrum.modules, cut.ranks, strict=True)
    )  # fmt: skip
    lora_rank = max(1, -(-cut.budget // spectrum.uniform(1)))
    return RankPlan(
        method=METHOD,
        options=dict(asked),
        budget_unit="params",
        lora_rank=lora_rank,
        lora_alpha=int_if_integral(decomposition.scale * lora_rank),
        modules=modules,
        provenance=_provenance(decomposition.adapter),
    )


def _provenance(adapter: SourceAdapter) -> dict[str, Any]:
    trained = recorded_provenance(adapter.folder)
    facts = {key: trained[key] for key in _OF_THE_BASE if trained.get(key) is not None}
    versions = installed_versions(("llamafactory-adaptive", "torch", "peft"))
    return {"base_model": adapter.config.get("base_model_name_or_path"), **facts, "versions": versions}


def _summary(spectrum: AdapterSpectrum, cut: Cut) -> str:
    ranks, full = [rank for rank in cut.ranks if rank], spectrum.parameters
    return (
        f"{len(ranks)} of {len(cut.ranks)} modules, ranks {min(ranks)} to {max(ranks)}: {cut.parameters:,} of "
        f"{full:,} parameters ({cut.parameters / full:.1%}), {cut.kept_share:.2%} of the energy (the squared singular "
        "values of all updates; it is not the loss)"
    )


def _told_of_scales(adapter: SourceAdapter, scale: float) -> list[str]:
    """Tell that modules differed in alpha/r, which the cut has in its factors and ranks trained afresh cannot have."""
    scales = {one.scale for one in adapter.modules}
    if math.isclose(min(scales), max(scales), rel_tol=1e-9):
        return []
    return [f"alpha/r differed by module, {min(scales):g} to {max(scales):g}; the cut keeps the strength of each, and "
            f"the command below trains all at {scale:g}"]  # fmt: skip


def _next(out: Path, plan: RankPlan, rslora: bool) -> list[str]:
    """List the commands that serve the cut adapter, and that train its ranks afresh at its own alpha/r."""
    rank, alpha = _rank_and_whole_alpha(plan.scale, plan.lora_rank)
    # A YAML gives these to the run that the adapter is from: with its alpha another strength would be trained, in its
    # output_dir the run would be resumed, and counted in ranks the budget of the cut is another.
    settings = {"finetuning_type": "adaptive", "adaptive_plan": out / PLAN_FILE, "adaptive_budget_unit": "params",
                "lora_rank": rank, "lora_alpha": alpha, "output_dir": f"{out}-afresh"}  # fmt: skip
    if rslora:
        settings["use_rslora"] = "false"
    words = " ".join(quote(f"{key}={value}") for key, value in settings.items())
    return [
        f"written to {out}; next:",
        f"  llamafactory-adaptive export {quote(str(out))} --for vllm --out {quote(f'served/{out.name}')}",
        f"  llamafactory-cli train my.yaml {words}   # afresh, on these ranks",
    ]


def _rank_and_whole_alpha(scale: float, least: int) -> tuple[int, int]:
    """Return the least ``lora_rank`` from ``least`` on, and the whole ``lora_alpha``, whose alpha/r is nearest.

    LLaMA-Factory takes whole alphas alone. Where ranks are given, ``lora_rank`` is only a budget that they must keep.
    """

    def error(rank: int) -> float:
        return round(abs(max(1, round(scale * rank)) / (scale * rank) - 1.0), 9)

    rank = min(range(least, least + _RANKS_TRIED), key=error)
    return rank, max(1, round(scale * rank))
