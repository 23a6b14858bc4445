"""One or several runs as a page: a single HTML file without scripts that needs no network."""

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_adaptive.reports.data_page import data_page
from llamafactory_adaptive.reports.html import rendered
from llamafactory_adaptive.reports.rank_history import read_rank_history
from llamafactory_adaptive.reports.rank_pictures import difference_heatmap, history_picture, rank_heatmap, share_bars
from llamafactory_adaptive.reports.run_costs import cost_notes, cost_rows
from llamafactory_adaptive.reports.run_document import run_document
from llamafactory_adaptive.reports.run_pictures import budget_picture, loss_picture
from llamafactory_adaptive.reports.run_report import NOISE, Run, comparison_rows, method_rows, same_modules
from llamafactory_adaptive.reports.tables import type_rows


Rows = list[tuple[str, str]]


def html_report(runs: Sequence[Run], others: Mapping[str, str]) -> str:
    """Write the page.

    Args:
        runs: finished runs.
        others: by name of the folder, the text of folders that hold no finished run.
    """
    entries = [_entry(run, f"run-{number}") for number, run in enumerate(runs, 1)]
    names = [entry["name"] for entry in entries]
    return rendered(
        "report.html.j2",
        title=" and ".join(names) if 0 < len(names) < 3 else f"{len(names)} runs",
        entries=entries,
        others=others,
        comparison=_comparison(runs) if len(runs) > 1 else None,
    )


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Build what several runs have side by side; ranks are compared where the first run has the same modules."""
    first, *rest = runs
    alike = [run for run in rest if same_modules(run, first)]
    kinds = list(dict.fromkeys(row[0] for run in runs for row in type_rows(run.plan, str)[1:]))
    means = [{row[0]: row[2] for row in type_rows(run.plan, str)[1:]} for run in runs]
    return {
        "runs": comparison_rows(runs),
        "methods": method_rows(runs),
        "note": NOISE,
        "ranks": [["module type", *(run.folder.name for run in runs)],
                  *([kind, *(mean.get(kind, "") for mean in means)] for kind in kinds)],
        "differences": [(run.folder.name, first.folder.name, difference_heatmap(run.plan, first.plan, style=False))
                        for run in alike if run.plan.digest() != first.plan.digest()],
    }  # fmt: skip


def _entry(run: Run, anchor: str) -> dict[str, Any]:
    document = run_document(run)
    history = read_rank_history(run.folder, [module.name for module in run.plan.modules])
    data = document["data_quality"]
    return {
        "anchor": anchor,
        "name": run.folder.name or str(run.folder),
        "document": document,
        "base": str(document["asked"]["base_model"] or "").rstrip("/").rpartition("/")[2],
        "tiles": _tiles(document),
        "asked": _asked(document),
        "result": _result(document),
        "types": type_rows(run.plan, str),
        "heatmap": rank_heatmap(run.plan, style=False),
        "shares": share_bars(run.plan, style=False),
        "history": history_picture(history, run.plan.lora_rank, run.steps, style=False) if history else None,
        "budget": budget_picture(run.log, document["budget"], anchor),
        "losses": loss_picture(document["losses"], document["eval_losses"], anchor),
        "costs": cost_rows(document["costs"]),
        "cost_notes": cost_notes(document["costs"]),
        "data": None if data is None else data_page(data),
    }


def _tiles(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Choose the few figures that say most of a run: name, figure, and what it is measured against."""
    budget, costs = document["budget"], document["costs"]
    share = budget["used_parameters"] / budget["asked_parameters"]
    whole = costs["seconds"] or costs["train_seconds"]
    tiles = [("trainable parameters", f"{budget['used_parameters']:,}",
              f"{share:.2%} of uniform LoRA's, rank {document['asked']['lora_rank']}")]  # fmt: skip
    ranks = document["ranks"]
    of = f"{ranks['with_adapter']} of {ranks['modules']} modules have an adapter"
    tiles.append(("ranks", f"{ranks['smallest']} to {ranks['largest']}", of))
    for key, name in (("eval_loss", "evaluation loss"), ("train_loss", "training loss, mean")):
        if document[key] is not None:
            tiles.append((name, f"{document[key]:.4f}", f"after {document['steps']:,} steps"))
    if whole:
        part = f"{costs['overhead_seconds'] / whole:.1%} of it for what plain LoRA has not"
        tiles.append(("time", _duration(whole), part))
    return tiles


def _asked(document: Mapping[str, Any]) -> Rows:
    asked, budget = document["asked"], document["budget"]
    bits = asked["quantization_bit"]
    rows = [
        ("base model", str(asked["base_model"] or "") + (f", {bits} bits" if bits else "")),
        ("method", document["method"]),
        ("options", _listed(document["options"])),
        ("budget", f"the cost of uniform rank {asked['lora_rank']}: {budget['asked_parameters']:,} parameters, "
                   f"{budget['asked_ranks']:,} ranks; counted in {budget['unit']}"),
        ("lora_alpha", f"{asked['lora_alpha']:g}"),
        ("bounds", _listed(asked["bounds"])),
        ("search", _listed(asked["search"])),
        ("calibration data", _listed(asked["dataset"])),
        ("training data", _listed(asked["training_dataset"])),
        ("learning rate", "" if asked["learning_rate"] is None else f"{asked['learning_rate']:g}"),
        ("batch size", "" if asked["batch_size"] is None else f"{asked['batch_size']:g} rows a step"),
        ("seed", "" if asked["seed"] is None else str(asked["seed"])),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def _result(document: Mapping[str, Any]) -> Rows:
    budget, ranks = document["budget"], document["ranks"]
    rows = [
        ("parameters", f"{budget['used_parameters']:,} used, {budget['left_parameters']:,} left over"),
        ("ranks", f"{budget['used_ranks']:,} in all (uniform: {budget['asked_ranks']:,}), {ranks['smallest']} to "
                  f"{ranks['largest']} a module"),
        ("modules", f"{ranks['with_adapter']} of {ranks['modules']} with an adapter"),
        ("steps", f"{document['steps']:,}"),
    ]  # fmt: skip
    for key, name in (("train_loss", "training loss, mean"), ("eval_loss", "evaluation loss, last")):
        if document[key] is not None:
            rows.append((name, f"{document[key]:.4f}"))
    return [*rows, ("plan digest", ranks["digest"][:12])]


def _listed(value: Any) -> str:
    """Format settings of a run as text, without those that are not set."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_listed(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(_listed, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
