"""Tables of a plan, and the closing words of a run; the same for all methods."""

from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from llamafactory_adaptive.ranks.module_names import layer_and_type, module_type
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.ranks.schedule import Schedule, spacing
from llamafactory_adaptive.reports.plaintext import plain


_BYTES_PER_PARAMETER = 4  # LLaMA-Factory trains and saves LoRA factors in fp32


def rank_grid(plan: RankPlan) -> tuple[list[int | None], list[str], dict[tuple[int | None, str], float]]:
    """Compute layers, types, and the mean rank of each cell (experts of one layer share a cell)."""
    cells: dict[tuple[int | None, str], list[int]] = {}
    for module in plan.modules:
        cells.setdefault(layer_and_type(module.name), []).append(module.rank)
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    types = list(dict.fromkeys(kind for _, kind in cells))
    return layers, types, {cell: sum(ranks) / len(ranks) for cell, ranks in cells.items()}


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of cells as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def rank_table(plan: RankPlan) -> str:
    """Format a plan as text: rank per layer and module type, a summary per type, totals against uniform LoRA."""
    layers, types, cells = rank_grid(plan)
    grid = [["layer", *map(plain, types)]]
    for layer in layers:
        values = [cells.get((layer, kind)) for kind in types]
        grid.append(["-" if layer is None else str(layer), *("" if v is None else f"{v:g}" for v in values)])
    title = f"Ranks ({plain(plan.method)}, {len(plan.modules)} modules)"
    lines = [title, *align(grid), "", *align(type_rows(plan)), ""]
    return "\n".join(lines + totals(plan))


def type_rows(plan: RankPlan, written: Callable[[str], str] = plain) -> list[list[str]]:
    """Summarise each module type in a row; ``written`` escapes names for the format of the output."""
    rows = [["module type", "modules", "mean rank", "range", "share", "parameters"]]
    for entry in ranks_by_type(plan):
        rows.append(
            [
                written(entry["type"]),
                str(entry["modules"]),
                f"{entry['mean_rank']:.1f}",
                f"{entry['smallest']}-{entry['largest']}",
                f"{entry['share_of_score']:.1%}",
                f"{entry['parameters']:,}",
            ]
        )
    return rows


def ranks_by_type(plan: RankPlan) -> list[dict[str, Any]]:
    """Summarise the ranks of each module type."""
    by_type: dict[str, list[ModulePlan]] = {}
    for module in plan.modules:
        by_type.setdefault(module_type(module.name), []).append(module)
    return [
        {
            "type": kind,
            "modules": len(modules),
            "mean_rank": sum(module.rank for module in modules) / len(modules),
            "smallest": min(module.rank for module in modules),
            "largest": max(module.rank for module in modules),
            "share_of_score": sum(module.share for module in modules),
            "parameters": sum(module.parameters for module in modules),
        }
        for kind, modules in by_type.items()
    ]


def totals(plan: RankPlan) -> list[str]:
    """Compare the plan's cost with a uniform LoRA of ``lora_rank``, in parameters, ranks and megabytes."""
    b = plan.budget()
    ratio = b["used_parameters"] / b["asked_parameters"]
    return [
        f"trainable parameters  {b['used_parameters']:,} of {b['asked_parameters']:,} "
        f"(uniform LoRA of rank {plan.lora_rank}): {ratio:.3%}",
        f"sum of ranks          {b['used_ranks']:,} (uniform: {b['asked_ranks']:,}); budget counted in "
        f"{plan.budget_unit}; largest rank {plan.largest_rank}",
        f"adapter size          {b['used_parameters'] * _BYTES_PER_PARAMETER / 1e6:.1f} MB in fp32",
    ]


def concentration_warning(plan: RankPlan, upper: int) -> str | None:
    """Return a warning if few modules hold most of the score or many are at their largest rank; None otherwise."""
    shares = sorted((module.share for module in plan.modules), reverse=True)
    few = max(1, len(shares) // 20)
    held = sum(shares[:few])
    capped = sum(module.rank >= min(upper, module.largest_rank) for module in plan.modules)
    if held <= 0.5 and capped <= len(shares) // 4:
        return None
    return f"{few} of {len(shares)} modules hold {held:.0%} of the score, {capped} sit at their largest rank"


def schedule_table(start: RankPlan, schedule: Schedule, total_steps: int) -> str:
    """Describe in text what a dynamic method will do: its starting ranks and the budget at a few steps."""
    between = (schedule.begin + (schedule.end - schedule.begin) * quarter // 4 for quarter in range(5))
    points = sorted({0, *between, total_steps})
    rows = [["step", f"budget ({start.budget_unit})", "of the start"]]
    rows += [[str(t), f"{schedule.budget(t):,}", f"{schedule.budget(t) / schedule.start_budget:.0%}"] for t in points]
    head = (
        f"Ranks are found during training ({plain(start.method)}, {len(start.active)} modules): all start at up to "
        f"rank {start.largest_rank}, an allocation {spacing(schedule)}, final from step "
        f"{schedule.end} of {total_steps}"
    )
    return "\n".join([head, *align(rows)])


def closing_words(
    plan: RankPlan, output: Path, overhead_seconds: float, seconds: float, warnings: Sequence[str], chat: str
) -> str:
    """Write the closing words of a run: ranks by type, the cost of finding them, its files, commands for next steps.

    Args:
        plan: the plan that was trained.
        output: the run's ``output_dir``.
        overhead_seconds: seconds of planning, scoring and allocating.
        seconds: seconds of the whole run.
        warnings: the warnings of the run.
        chat: the command that talks to the adapter.
    """
    share = overhead_seconds / seconds if seconds > 0 else 0.0
    files = ", ".join(sorted(path.name for path in output.glob("adaptive_*") if path.is_file()))
    return "\n".join(
        [
            "",
            f"Adaptive ranks ({plain(plan.method)}), {len(plan.active)} of {len(plan.modules)} modules",
            *align(type_rows(plan)),
            *totals(plan),
            f"finding ranks took {overhead_seconds:.1f} of {seconds:.1f} s ({share:.1%})",
            f"in {output}: {files}",
            *(f"warning: {text}" for text in warnings),
            "next:",
            f"  llamafactory-adaptive report {quote(str(output))} --html {quote(f'{output.name}.html')}",
            f"  llamafactory-adaptive export {quote(str(output))} --for vllm --out {quote(f'served/{output.name}')}",
            f"  {chat}",
        ]
    )
