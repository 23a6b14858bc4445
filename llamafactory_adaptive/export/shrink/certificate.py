"""The certificate of a cut: what each module lost, and the proof that no adapter of these ranks loses less.

saved      names, ranks, shapes, scale and finiteness of the files, against the plan, as after training.
modules    scale * B A of the written factors against the exact truncation of the module's update in fp64, relative to
           the truncation's own size.
distance   of the written update from the uncut one, against the smallest distance that its rank allows (the root of
           the sum of the squared singular values left out), relative to the uncut one. It uses none of the vectors
           that the cut was made with.
"""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llamafactory_adaptive.adapter.verify import check_saved
from llamafactory_adaptive.calibration.factored_svd import decompose
from llamafactory_adaptive.export.faults import ExportError
from llamafactory_adaptive.export.source_adapter import SourceAdapter, read_adapter
from llamafactory_adaptive.export.verify.certificate import PACKAGES, Check, digests, failures, write_certificate
from llamafactory_adaptive.export.verify.module_updates import TOLERANCE, Update, relative_difference
from llamafactory_adaptive.files import CUT_FILE
from llamafactory_adaptive.ranks.component_cuts import Cut, ModuleSpectrum
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.versions import installed_versions


SCHEMA_VERSION = 1


def certify(adapter: SourceAdapter, cut: Cut, plan: RankPlan, folder: Path) -> list[str]:
    """Check a cut adapter, write its certificate beside it, and return the checks in words.

    Raises:
        GuardError: the files are not what the plan says.
        ExportError: a module's update is not the best one of its rank.
    """
    check_saved(folder, plan)
    written = read_adapter(folder)
    rows = [_module_row(adapter, written, one, rank) for one, rank in zip(cut.spectra, cut.ranks, strict=True) if rank]
    checks = [
        _worst("modules", "the exact truncation of each update", rows, "relative_error"),
        _worst("distance", "the smallest that each rank allows", rows, "excess_distance"),
    ]
    if not all(check.passed for check in checks):
        raise ExportError(f"the cut adapter is not the best of its ranks, nothing was written:\n  {failures(checks)}")
    write_certificate(_document(adapter, cut, plan, folder, rows, checks), folder, CUT_FILE)
    return [*map(str, checks)]


def _module_row(adapter: SourceAdapter, written: SourceAdapter, one: ModuleSpectrum, rank: int) -> dict[str, Any]:
    """Compare one module's written update with its exact truncation and with the uncut one."""
    name = one.shape.name
    uncut, after = _update(adapter, name), _update(written, name)
    exact: Update = (*decompose(*uncut).factors(rank, 1.0), 1.0)
    lost = one.energy_from(rank) / one.energy if one.energy > 0 else 0.0
    return {
        "name": name,
        "rank_before": one.rank,
        "rank": rank,
        "lost_energy": lost,
        "relative_error": relative_difference(exact, after),
        "excess_distance": abs(relative_difference(uncut, after) - lost**0.5),
    }


def _update(adapter: SourceAdapter, name: str) -> Update:
    return (*adapter.factors(name), adapter.by_name[name].scale)


def _worst(name: str, reference: str, rows: list[dict[str, Any]], key: str) -> Check:
    worst = max(rows, key=lambda row: (row[key] != row[key], row[key]))  # NaN is the worst of all
    return Check(name, reference, f"{len(rows)} written updates", worst[key], TOLERANCE, "relative", worst["name"])


def _document(
    adapter: SourceAdapter, cut: Cut, plan: RankPlan, folder: Path, rows: list[dict[str, Any]], checks: list[Check]
) -> dict[str, Any]:
    before = sum(one.rank * one.shape.parameters_per_rank for one in cut.spectra)
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": True,
        "date": time.strftime("%Y-%m-%d"),
        "base": adapter.config.get("base_model_name_or_path"),
        "asked": dict(plan.options),
        "parameters_before": before,
        "parameters_allowed": cut.budget,
        "parameters": cut.parameters,
        "kept_energy": cut.kept_share,
        "kept_energy_by_type": cut.kept_by_type(),
        "scale": plan.scale,
        "checks": [{**asdict(check), "passed": check.passed} for check in checks],
        "modules": rows,
        "dropped_modules": [one.shape.name for one, rank in zip(cut.spectra, cut.ranks, strict=True) if not rank],
        "versions": installed_versions(PACKAGES),
        "adapter_files": digests(adapter.folder, adapter.folder.glob("adapter_*")),
        "cut_files": digests(folder, folder.glob("adapt*")),
    }
