"""Reports for people: the table, the comparisons in words, and a bar chart, each of one protocol only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.results import Score


TABLE_FILE = "eval_results.txt"
CHART_FILE = "eval_results.png"
_WORDS = {"lm_eval": "lm-evaluation-harness's prompts", "llm_adapters": "the prompts and parsing of the PEFT papers"}


def _one_protocol(scores: Sequence[Score]) -> str:
    protocols = {score.protocol for score in scores}
    if len(protocols) != 1:
        raise ValueError(f"figures of {' and '.join(sorted(protocols))} are not comparable and never share a table")
    return protocols.pop()


def _align(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Pad every column to one width, with the first ``left`` aligned to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def percent(value: float) -> str:
    """Format a share as a percentage with two decimals; ``-`` for NaN."""
    return "-" if value != value else f"{100 * value:.2f}"


def table(scores: Sequence[Score], means: Sequence[Mapping[str, Any]], versions: Mapping[str, str]) -> str:
    """Format all figures as text, headline metrics marked with ``*``, then the mean over tasks.

    Raises:
        ValueError: the figures are of different protocols.
    """
    protocol = _one_protocol(scores)
    rows = [["model", "served as", "task", "metric", "version", "shots", "n", "value %", "stderr"]]
    for s in scores:
        mark = "*" if s.headline else ""
        rows.append(
            [s.model, s.form, s.task, s.metric + mark, s.task_version, str(s.fewshot), str(s.n), percent(s.value),
             percent(s.stderr)]
        )  # fmt: skip
    average = [["mean of *", "", "value %", "stderr"]]
    average += [[m["model"], f"{len(m['tasks'])} tasks", percent(m["value"]), percent(m["stderr"])] for m in means]
    used = ", ".join(f"{name} {versions[name]}" for name in ("vllm", "lm_eval") if name in versions)
    title = f"Protocol {protocol}: {_WORDS[protocol]} ({used})"
    return "\n".join([title, "", *_align(rows, 5), "", *_align(average, 2), *_cut_prompts(scores)])


def _cut_prompts(scores: Sequence[Score]) -> list[str]:
    return [
        f"CUT: {s.model}, {s.task}: {s.n_cut} of {s.n} prompts were longer than the server takes and lost their "
        "beginning"
        for s in scores
        if s.headline and s.n_cut
    ]


def comparison_text(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Format paired comparisons as text, one line per task and seed, and one for the mean."""
    rows = [
        ["second - first", "task", "difference", "only first right", "only second right", "p (McNemar)", "p (Holm)"]
    ]
    lines = []
    for c in comparisons:
        pair = f"{c['second']} - {c['first']}"
        for t in c["tasks"]:
            rows.append(
                [pair, t["task"] + (f" (seed {t['seed']})" if _several_seeds(c, t) else ""),
                 f"{100 * t['difference']:+.2f}", str(t["only_first"]), str(t["only_second"]), f"{t['p_value']:.3g}",
                 f"{t['p_holm']:.3g}"]
            )  # fmt: skip
        lines.append(f"{pair}, mean over tasks: {_in_words(c['mean_difference'])}")
    return "\n".join(["Paired comparisons on the same rows", "", *_align(rows, 2), "", *lines])


def _in_words(difference: Mapping[str, Any]) -> str:
    if difference["low"] is None:
        spread = f"no interval, since the models differ on {difference['n_differ']} rows only"
    else:
        spread = f"95 % interval {100 * difference['low']:+.2f} to {100 * difference['high']:+.2f} (paired bootstrap)"
    return f"{100 * difference['value']:+.2f} points, p {difference['p_value']:.3g} (sign flips), {spread}"


def _several_seeds(comparison: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    return len([t for t in comparison["tasks"] if t["task"] == entry["task"]]) > 1


def save_chart(scores: Sequence[Score], path: Path) -> None:
    """Draw the headline metrics as bars with standard errors, and write a PNG.

    Raises:
        ValueError: the figures are of different protocols.
    """
    from matplotlib.figure import Figure

    protocol = _one_protocol(scores)
    shown = {(s.model, s.task): s for s in scores if s.headline}
    models, tasks = (list(dict.fromkeys(key[i] for key in shown)) for i in (0, 1))
    figure = Figure(figsize=(1.8 + 0.5 * len(tasks) * (1 + len(models)), 3.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for i, model in enumerate(models):
        at = [t + (i - (len(models) - 1) / 2) * width for t in range(len(tasks))]
        bars = [shown[model, task] for task in tasks]
        errors = [0.0 if b.stderr != b.stderr else 100 * b.stderr for b in bars]
        axes.bar(at, [100 * b.value for b in bars], width, yerr=errors, capsize=3, label=model)
    labels = [f"{task}\n{next(s.metric for s in scores if s.task == task and s.headline)}" for task in tasks]
    axes.set_xticks(range(len(tasks)), labels, fontsize=8)
    axes.set_ylabel("% (bars: standard error)")
    axes.set_title(f"protocol {protocol}", fontsize=10)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
