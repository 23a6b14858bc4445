"""One export from start to end: check everything, write into a scratch folder, certify, and rename it at the end."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamafactory_adaptive.errors import PlanError, refuse
from llamafactory_adaptive.export import layouts, merging, nf4_merging
from llamafactory_adaptive.export.base_checkpoint import BaseCheckpoint, check_fit, copy_side_files, find_base
from llamafactory_adaptive.export.faults import ExportError, loading_fault
from llamafactory_adaptive.export.request import ExportRequest
from llamafactory_adaptive.export.scratch import check_new_folder, scratch_folder
from llamafactory_adaptive.export.serve_command import max_lora_rank, serve_command
from llamafactory_adaptive.export.source_adapter import SourceAdapter, read_adapter
from llamafactory_adaptive.export.verify.certificate import certificate, failures, write_certificate
from llamafactory_adaptive.export.verify.compare import Comparer
from llamafactory_adaptive.export.verify.log_probabilities import tokenise
from llamafactory_adaptive.export.verify.vllm_check import check_vllm
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.module_groups import STACKED
from llamafactory_adaptive.ranks.plan import load_plan


@dataclass(frozen=True)
class Export:
    """A request that has passed all checks, with what was read for them."""

    request: ExportRequest
    adapter: SourceAdapter
    base: BaseCheckpoint
    skeleton: nn.Module
    rows: list[list[int]]

    @property
    def rank(self) -> int:
        """Return the largest rank of the exported adapter."""
        return max(module.rank for module in self.adapter.modules)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of merged weights: the one asked for, or that of the base's files."""
        asked = self.request.dtype
        return merging.only_dtype(self.base) if asked == "auto" else getattr(torch, asked)

    @property
    def nf4(self) -> nf4_merging.Nf4 | None:
        """Return how the base is quantised before merging; None if it is merged as it is."""
        return nf4_merging.Nf4(self.request.double_quantization) if self.request.quantization_aware else None


def run_export(request: ExportRequest) -> str:
    """Run one export and return the text for the user.

    Raises:
        AdaptiveConfigError: the request is refused, before anything is written.
        ExportError: the export or its parity check failed; nothing is written to the output folder.
    """
    export = prepare(request)
    with scratch_folder(request.out) as scratch:
        notes = write(export, scratch)
        print("comparing with PEFT", flush=True)
        checks = certify(export, scratch)
    where = serve_command(request.server, export.base, request.out, export.rank)
    return "\n".join([*notes, *checks, f"written to {request.out}; to serve it:", where])


def prepare(request: ExportRequest) -> Export:
    """Read adapter and base, and check everything that can be refused without loading a model."""
    check_new_folder(request.out)
    if request.vllm_python:
        check_vllm(request.vllm_python, request.server)
    adapter = read_adapter(request.adapter)
    base = find_base(request.base, adapter)
    skeleton = base.skeleton()
    check_fit(adapter, base, skeleton)
    _check_server(request.server, adapter, base, skeleton)
    export = Export(request, adapter, base, skeleton, _rows(base))
    if request.server == "merged":
        _check_space(request.out, merging.merged_bytes(base, export.dtype))
    return export


def _check_space(out: Path, needed: int) -> None:
    existing = next(folder for folder in out.resolve().parents if folder.is_dir())
    if (free := shutil.disk_usage(existing).free) < needed:
        why = f"the merged weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there"
        refuse("out", str(out), why, "a folder on another disk")


def _check_server(server: str, adapter: SourceAdapter, base: BaseCheckpoint, skeleton: nn.Module) -> None:
    if server == "merged":
        merging.check_replaced(adapter, base, skeleton)
    elif adapter.replaced or adapter.config.get("modules_to_save"):
        saved, why = adapter.config.get("modules_to_save"), f"{server} reads LoRA factors only"
        refuse("modules_to_save", saved, why, "--for merged")
    if server in ("vllm", "vllm-legacy"):
        max_lora_rank(max(module.rank for module in adapter.modules))


def _rows(base: BaseCheckpoint) -> list[list[int]]:
    try:
        return tokenise(base.folder)
    except Exception as error:  # whatever a tokenizer from elsewhere makes of the libraries that load it
        why = f"its tokenizer cannot be loaded ({loading_fault(error)})"
        refuse("base", base.name, why, "--base <folder with a tokenizer>", cause=error)


def write(export: Export, target: Path) -> list[str]:
    """Write the layout into ``target`` and return notes for the user."""
    request, adapter, base = export.request, export.adapter, export.base
    if request.server == "merged":
        return _write_merged(export, target)
    if request.server in ("sglang", "llamacpp"):
        together = STACKED if request.server == "sglang" else ()
        layouts.write_padded(adapter, base.name, target, export.skeleton, together)
        return [f"{len(adapter.modules)} modules, padded to rank {export.rank}"]
    layouts.write_contract(adapter, base.name, target)
    ranks = [module.rank for module in adapter.modules]
    return [f"{len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}"]


def _write_merged(export: Export, target: Path) -> list[str]:
    adapter, base = export.adapter, export.base
    report, options, notes = None, {}, []
    if export.nf4:
        report = nf4_merging.QuantisationReport(export.nf4)
        options["prepare"] = report.transform(adapter, nf4_merging.quantised_weights(export.skeleton))
    copy_side_files(base, adapter.folder, target)
    merging.merge(adapter, base, target, export.dtype, **options)
    merging.set_dtype(target, export.dtype)
    if report:
        report.save(target)
        notes.append(report.table())
    notes += _hint(export)
    return [*notes, f"{len(adapter.modules)} modules merged into {len(base.shards)} file(s)"]


def _hint(export: Export) -> list[str]:
    """Suggest ``--quantization-aware`` if the plan beside the adapter was made on a 4-bit base."""
    path = export.adapter.folder / PLAN_FILE
    if export.nf4 or not path.is_file():
        return []
    try:
        bits = load_plan(path).provenance.get("quantization_bit")
    except PlanError:  # of another version, say; the adapter does not need it
        return []
    if bits != 4:
        return []
    return [
        "the ranks were planned on a 4-bit base; if the adapter was trained on it, --quantization-aware merges into "
        "the weights that training saw"
    ]


def certify(export: Export, folder: Path) -> list[str]:
    """Compare the export with PEFT, write the certificate, and return the checks in words.

    Raises:
        ExportError: a check failed.
    """
    request, adapter = export.request, export.adapter
    comparer = Comparer(adapter, export.base, export.rows, request.tolerance, request.vllm_python)
    if request.server == "merged":
        comparison = comparer.merged(folder, export.dtype, export.nf4)
    else:
        comparison = comparer.layout(request.server, folder)
    if not comparison.passed:
        raise ExportError(f"parity failed, nothing was written to {request.out}:\n  {failures(comparison.checks)}")
    write_certificate(certificate(comparison, export.rows, folder, adapter.folder, **_facts(export)), folder)
    return [*map(str, comparison.checks), *comparison.warnings()]


def _facts(export: Export) -> dict[str, Any]:
    request, ranks = export.request, [module.rank for module in export.adapter.modules]
    return {
        "server": request.server,
        "base": export.base.name,
        "modules": len(ranks),
        "ranks": [min(ranks), max(ranks)],
        "dtype": str(export.dtype).removeprefix("torch.") if request.server == "merged" else None,
        "quantization_aware": request.quantization_aware,
    }
