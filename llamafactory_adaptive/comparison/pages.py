"""The files that a comparison leaves: ``compare.json``, ``compare.md`` and ``compare.html``."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafactory_adaptive.comparison.arms import CONTROL, PLAIN, GridPoint
from llamafactory_adaptive.comparison.losses import far_seed
from llamafactory_adaptive.comparison.results import budget_words
from llamafactory_adaptive.comparison.task_pages import task_markdown, task_page
from llamafactory_adaptive.files import write_atomically
from llamafactory_adaptive.reports.plaintext import markdown


JSON_FILE, MARKDOWN_FILE, HTML_FILE = "compare.json", "compare.md", "compare.html"
HEAD = ("arm", "best rate", "held-out loss", "against plain lora", "against random ranks", "parameters", "seconds")


def write_pages(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the document and both pages, and return their paths.

    Raises:
        OutputError: a file cannot be written.
    """
    from llamafactory_adaptive.comparison.plots import figures

    texts = {
        JSON_FILE: json.dumps(document, indent=1) + "\n",
        MARKDOWN_FILE: markdown_page(document),
        HTML_FILE: html_page(document, figures(document)),
    }
    for name, text in texts.items():
        write_atomically(folder / name, text)
    return [folder / name for name in texts]


def table(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Build the rows of the table of arms, without its head."""
    return [_row(arm) for arm in document["arms"]]


def text_table(document: Mapping[str, Any]) -> list[str]:
    """Format the table of arms for a terminal."""
    rows = [HEAD, *table(document)]
    widths = [max(len(row[column]) for row in rows if row[-1] or column == 0) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(arm: Mapping[str, Any]) -> tuple[str, ...]:
    if "loss" not in arm:
        what = "diverged at every rate" if "diverged" in arm else f"could not be run: {arm['failed']}"
        return (arm["name"], what, *[""] * (len(HEAD) - 2))
    best = arm["best"]
    rate = f"{best['rate']:g}" + ("" if best["alpha"] is None else f", alpha {best['alpha']:g}")
    rate += " (end of the grid)" if arm["best_at_the_edge"] else ""
    against = (_difference(arm["verdicts"].get(rival)) for rival in (PLAIN, CONTROL))
    costs = (f"{arm['parameters']:,}", f"{arm['seconds']:.0f}")
    return (arm["name"], rate, f"{arm['loss']:.4f}", *against, *costs)


def _difference(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None or verdict["difference"] is None:
        return ""
    return f"{100 * verdict['difference']['relative']['value']:+.2f} %, {verdict['verdict']}"


def sentences(document: Mapping[str, Any]) -> list[str]:
    """List the verdicts in words, and what a reader should know of the arms besides."""
    arms = document["arms"]
    said = [arm["verdicts"][rival]["words"] for rival in (PLAIN, CONTROL) for arm in arms
            if rival in arm.get("verdicts", {})]  # fmt: skip
    plain = next(arm for arm in arms if arm["name"] == PLAIN)
    said += [words for arm in arms if "loss" in arm and (words := budget_words(arm, plain))]
    return said + _reservations(document, arms) + list(document.get("changed", ()))


def _reservations(document: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """List what makes the result of an arm less certain than it looks."""
    said = []
    for key, what in (("best_at_the_edge", "rate"), ("best_alpha_at_the_edge", "alpha")):
        if edges := [arm["name"] for arm in arms if arm.get(key)]:
            said.append(f"the best {what} is the end of the grid for {', '.join(edges)}: a better one may lie beyond")
    for arm in arms:
        for point in arm.get("unstable", ()):
            at = GridPoint(**point)
            said.append(f"{arm['name']}: {at} was left out, as a run with one of the seeds that judge diverged there")
        if far := _far_seed(arm):
            said.append(far)
        if "failed" in arm and "loss" in arm:
            done, asked = len(arm["seeds"]), document["design"]["seeds"]
            said.append(
                f"{arm['name']}: judged by {done} of {asked} seeds, as a run could not be made: {arm['failed']}"
            )
    return said


def _far_seed(arm: Mapping[str, Any]) -> str:
    """Tell of the seed that ended far above the others, as runs at too high a rate do; empty where none did."""
    losses = arm.get("losses", ())
    if (place := far_seed(losses)) is None:
        return ""
    return (
        f"{arm['name']}: seed {arm['seeds'][place]} ended at a loss of {losses[place]:.4f}, where the median of the "
        f"seeds is {statistics.median(losses):.4f}: the mean tells of that run alone; more --rate-seeds may find a "
        "rate at which all hold"
    )


def markdown_page(document: Mapping[str, Any]) -> str:
    """Write the table and the verdicts as Markdown."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(tuple(map(markdown, row)) for row in table(document))]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    words = [f"* {markdown_sentence(sentence)}" for sentence in sentences(document)]
    tasks = task_markdown(document, markdown_sentence)
    return "\n".join(["# Comparison", "", _protocol(document), "", *lines, "", *words, "", *tasks])


def markdown_sentence(sentence: str) -> str:
    """Escape a whole sentence for Markdown, however long it is."""
    return "".join(markdown(sentence[start : start + 100]) for start in range(0, len(sentence), 100))


def _protocol(document: Mapping[str, Any]) -> str:
    rows, seeds = document["held_out_rows"], document["design"]["seeds"]
    return (
        f"Each arm has its own best learning rate, chosen on {rows['dev']} held-out rows; {rows['test']} others "
        f"judge, over {seeds} seeds that chose nothing. The same rows and the same budget for all. A difference below "
        f"{100 * document['smallest_effect']:g} % of plain LoRA's loss was not to matter."
    )


def html_page(document: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """Write a self-contained page with the table, the verdicts and the plots."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    return page.render(
        protocol=_protocol(document), head=HEAD, rows=table(document), sentences=sentences(document), plots=plots,
        command=document.get("command", ""), tasks=task_page(document),
    )  # fmt: skip


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison</title>
<style>
:root { color-scheme: light dark; --line: #d0d7de; --card: #ffffff; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.35rem 0.7rem; text-align: left; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; background: var(--card); border-radius: 0.5rem; padding: 0.5rem; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
figcaption { color: #24292f; font-weight: 600; }
code { font-size: 0.85rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Comparison</h1>
<p>{{ protocol }}</p>
<div class="wide"><table>
<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
<ul>
{% for sentence in sentences %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
{{ tasks | safe }}
{% for title, svg in plots.items() %}
<figure><figcaption>{{ title }}</figcaption>{{ svg | safe }}</figure>
{% endfor %}
<p><code>{{ command }}</code></p>
</body>
</html>
"""
