"""A finished run as HTML for the board: where its ranks are, how they came about, its cost, and another beside it."""

from html import escape
from pathlib import Path

from llamafactory_adaptive.bridge.board.labels import message
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.plaintext import plain, plain_lines
from llamafactory_adaptive.reports.rank_history import read_rank_history
from llamafactory_adaptive.reports.rank_pictures import difference_heatmap, history_picture, rank_heatmap, share_bars
from llamafactory_adaptive.reports.run_costs import cost_notes, cost_rows, run_costs
from llamafactory_adaptive.reports.run_report import Run, comparison, read_run, same_modules, texts_below_ranks
from llamafactory_adaptive.reports.tables import align, totals


def run_view(folder: Path, other: Path | None, lang: str) -> str:
    """Build the HTML of a run, beside another if there is one; every text from a file is escaped.

    Raises:
        PlanError: one of them is no run that has ended.
    """
    run = read_run(folder)
    parts = [_summary(run, lang), plan_view(run.plan, lang)]
    if (history := read_rank_history(folder, list(run.plan.ranks()))) is not None:
        parts.append(_section("history", lang, history_picture(history, run.plan.lora_rank, run.steps)))
    if other is not None:
        beside = read_run(other)
        parts.append(_section("difference", lang, _differences(run, beside, lang)))
        parts.append(_section("comparison", lang, _preformatted(comparison([run, beside]))))
    parts.append(_section("figures", lang, _preformatted(_figures(run))))
    return "".join(parts)


def _differences(run: Run, beside: Run, lang: str) -> str:
    if same_modules(run, beside):
        return difference_heatmap(run.plan, beside.plan)
    return f"<p>{escape(message('other_modules', lang))}</p>"


def _figures(run: Run) -> str:
    """Format as text what is told of a run besides its ranks: budget, losses, training data, and what it cost."""
    costs = run_costs(run.log or ({},), run.plan.provenance, run.train_seconds)
    ledger = [*align(cost_rows(costs)), *cost_notes(costs)]
    return "\n\n".join(["\n".join(totals(run.plan)), *texts_below_ranks(run), "\n".join(ledger)])


def plan_view(plan: RankPlan, lang: str) -> str:
    """Build the HTML of a plan: its ranks by layer and type, and the share of each type."""
    return _section("heatmap", lang, rank_heatmap(plan)) + _section("shares", lang, share_bars(plan))


def spent(plan: RankPlan, lang: str) -> dict[str, str]:
    """Return how much of its budget a plan spends, for a message."""
    budget, kind = plan.budget(), plan.budget_kind
    used, asked = (f"{budget[f'{which}_{kind}']:,}" for which in ("used", "asked"))
    return {"used": used, "asked": asked, "unit": message(kind, lang)}


def _summary(run: Run, lang: str) -> str:
    used = message("used_budget", lang, **spent(run.plan, lang))
    return f"<p><b>{escape(plain(run.folder.name))}</b> ({escape(plain(run.plan.method))}): {escape(used)}</p>"


def _section(name: str, lang: str, content: str) -> str:
    return f'<h4 style="margin: 1rem 0 0.5rem">{escape(message(name, lang))}</h4>{content}'


def _preformatted(text: str) -> str:
    return f'<pre style="overflow-x: auto; font-size: 0.8rem">{escape(plain_lines(text))}</pre>'
