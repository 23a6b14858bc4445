"""``llamafactory-adaptive shrink``: a trained adapter cut to a budget, or a curve over several budgets."""

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.cli.signals import signals_end_in_order
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.export.shrink.request import SAMPLES, WITHIN, ShrinkRequest, shrink_request
from llamafactory_adaptive.reports.plaintext import plain_lines, tell


if TYPE_CHECKING:
    from llamafactory_adaptive.export.shrink.shrinker import Decomposition
    from llamafactory_adaptive.ranks.component_cuts import Cut
    from llamafactory_adaptive.reports.cut_curve import HeldOutLosses


BUDGETS = 5  # of a curve


def shrink(arguments: argparse.Namespace) -> int:
    """Cut an adapter, or show what cuts keep; LLaMA-Factory is needed for held-out losses alone."""
    request = shrink_request(arguments)
    settings = _settings(request)
    from llamafactory_adaptive.export.shrink.shrinker import run_shrink

    with signals_end_in_order():
        print(plain_lines(_curve(request, settings) if request.curve else run_shrink(request)))
    return 0


def _settings(request: ShrinkRequest) -> dict[str, Any] | None:
    """Read the YAML by which held-out losses are taken; None where none are."""
    if request.data is None or request.config is None:
        return None
    require_enabled()
    tell(f"reading {request.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    from llamafactory_adaptive.bridge.held_out import check_trained_alike, held_out_settings
    from llamafactory_adaptive.export.adapter_config import read_config
    from llamafactory_adaptive.ranks.plan import recorded_provenance

    settings = held_out_settings(request.config, request.data, request.overrides)
    named = read_config(request.adapter).get("base_model_name_or_path")
    check_trained_alike(settings, request.data, recorded_provenance(request.adapter), named)
    return settings


def _curve(request: ShrinkRequest, settings: dict[str, Any] | None) -> str:
    """Cut to several budgets, take their held-out losses where asked to, and write table, JSON and picture."""
    from llamafactory_adaptive.export.scratch import scratch_folder
    from llamafactory_adaptive.export.shrink.shrinker import read_decomposition
    from llamafactory_adaptive.reports.cut_curve import CutCurve

    decomposition = read_decomposition(request)
    budgets = decomposition.spectrum.budgets(BUDGETS)
    if len(budgets) < 2:
        words = f"the adapter's {decomposition.spectrum.parameters:,} parameters are the fewest that it allows"
        refuse("min_rank", request.min_rank, words, "--min-rank 0")
    cuts = [decomposition.spectrum.cut(budget) for budget in budgets]
    with scratch_folder(request.out) as folder:
        losses = None if settings is None else _losses(request, settings, decomposition, cuts, folder)
        curve = CutCurve(request.adapter, decomposition.spectrum, cuts, losses)
        curve.save(folder)
    return f"{curve.text()}\nwritten to {request.out}"


def _losses(
    request: ShrinkRequest, settings: dict[str, Any], decomposition: "Decomposition", cuts: "list[Cut]", folder: Path
) -> "HeldOutLosses":
    """Write all components in order for another process, and have it take the losses of cuts and base model."""
    from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS
    from llamafactory_adaptive.bridge.held_out import held_out_job, held_out_losses
    from llamafactory_adaptive.export.shrink.shrinker import write_cut
    from llamafactory_adaptive.reports.cut_curve import HeldOutLosses

    assert request.data is not None
    all_components, job_folder = folder / "components", folder / "job"
    for made in (all_components, job_folder):
        made.mkdir()
    write_cut(decomposition, cuts[0], all_components)
    ranks = [cut.by_name() for cut in cuts]
    job = held_out_job(
        settings, request.data, request.samples or SAMPLES, components=all_components / ADAPTER_WEIGHTS,
        scale=decomposition.scale, cuts=(*ranks, dict.fromkeys(ranks[0], 0)),
        path=job_folder / "losses.safetensors",
    )  # fmt: skip
    losses_RN, tokens_N = held_out_losses(job)
    for made in (all_components, job_folder):
        shutil.rmtree(made)
    within = WITHIN if request.within is None else request.within
    return HeldOutLosses(request.data, within, losses_RN[:-1], losses_RN[-1], tokens_N)
