"""Tables and sentences on tasks for a terminal, ``compare.md`` and ``compare.html``."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from llamafactory_adaptive.comparison.arms import CONTROL, PLAIN
from llamafactory_adaptive.comparison.task_request import points
from llamafactory_adaptive.comparison.task_results import digits_of
from llamafactory_adaptive.comparison.task_scores import MEAN
from llamafactory_adaptive.reports.plaintext import markdown


HEAD = ("arm", "accuracy", "against plain lora", "95 % interval", "verdict", "would be shown", "against random ranks")
COMMONEST = "always the commonest answer"
Row = tuple[str, ...]


def task_tables(document: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Build one table for each task: its title to its rows, without the head; empty where no task was asked."""
    tasks = document.get("tasks")
    if tasks is None:
        return {}
    names = [*tasks["questions"], *([MEAN] if len(tasks["questions"]) > 1 else [])]
    digits = digits_of(tasks["smallest_effect"])
    return {
        _title(tasks, name): [*(_row(arm, name, digits) for arm in tasks["arms"]), *_blind(tasks, name, digits)]
        for name in names
    }


def commonest(tasks: Mapping[str, Any], name: str) -> float | None:
    """Return what always giving the commonest answer reaches in a task or the mean; None where choices are many."""
    shares = list(tasks["commonest_answer"].values()) if name == MEAN else [tasks["commonest_answer"][name]]
    return None if None in shares else statistics.fmean(shares)


def _blind(tasks: Mapping[str, Any], name: str, digits: int) -> list[Row]:
    """Build the row of one who does not read the questions; none where choices are many."""
    share = commonest(tasks, name)
    blanks = [""] * (len(HEAD) - 2)
    return [] if share is None else [(COMMONEST, f"{100 * share:.{digits}f} %", *blanks)]


def _title(tasks: Mapping[str, Any], name: str) -> str:
    if name == MEAN:
        return f"Mean over {len(tasks['questions'])} tasks"
    return f"{name}, {tasks['questions'][name]} questions, {tasks['metrics'][name]}"


def _row(arm: Mapping[str, Any], name: str, digits: int) -> Row:
    if "accuracy" not in arm:
        return (arm["name"], f"could not be evaluated: {arm['failed']}", *[""] * (len(HEAD) - 2))
    reached, verdicts = arm["accuracy"][name], arm["verdicts"].get(name, {})
    value = f"{100 * reached['value']:.{digits}f} % ± {100 * reached['standard_error']:.{digits}f}"
    verdict = verdicts.get(PLAIN)
    against = ("", "", "", "") if verdict is None else _cells(verdict, digits)
    control = verdicts.get(CONTROL)
    return (arm["name"], value, *against, "" if control is None else _difference(control, digits))


def _cells(verdict: Mapping[str, Any], digits: int) -> Row:
    low, high = (f"{100 * verdict['difference'][end]:+z.{digits}f}" for end in ("low", "high"))
    value = f"{100 * verdict['difference']['value']:+z.{digits}f} ± {100 * verdict['standard_error']:.{digits}f}"
    shown = f"{100 * verdict['detectable']:.{digits}f}" if verdict["detectable"] < 1.0 else "over 100"
    return (value, f"{low} to {high}", verdict["verdict"], shown)


def _difference(verdict: Mapping[str, Any], digits: int) -> str:
    return f"{100 * verdict['difference']['value']:+z.{digits}f}, {verdict['verdict']}"


def task_sentences(document: Mapping[str, Any]) -> list[str]:
    """List the verdicts on tasks in words, and what a reader should know besides; empty where no task was asked."""
    tasks = document.get("tasks")
    if tasks is None:
        return []
    arms = tasks["arms"]
    said = [
        verdicts[rival]["words"]
        for rival in (PLAIN, CONTROL)
        for arm in arms
        for verdicts in arm.get("verdicts", {}).values()
        if rival in verdicts
    ]
    for arm in arms:
        if "failed" in arm and "accuracy" in arm:
            said.append(f"{arm['name']}: answered with {len(arm['seeds'])} seeds alone: {arm['failed']}")
    return said + list(tasks["notes"])


def task_protocol(document: Mapping[str, Any]) -> str:
    """Describe how tasks were asked and judged."""
    tasks = document["tasks"]
    served = "merged into their base" if tasks["form"] == "merged" else "beside their base"
    first = f"the first {tasks['limit']} questions" if tasks["limit"] else "all questions"
    return (
        f"Protocol {tasks['protocol']}, {first} of each task; adapters of the seeds that judge, served {served}. "
        "Differences are in percentage points, paired by seed and question, with standard errors over both. A "
        f"difference below {points(tasks['smallest_effect'])} was not to matter; what 'would be shown' is one that "
        "so many questions and seeds find four times in five."
    )


def task_text(document: Mapping[str, Any]) -> list[str]:
    """Format tables and verdicts for a terminal."""
    lines = []
    for title, rows in task_tables(document).items():
        lines += ["", title, *_aligned([HEAD, *rows])]
    said = task_sentences(document)
    return [*lines, "", *said] if said else lines


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(len(row[column]) for row in rows if row[2] or column == 0) for column in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def task_markdown(document: Mapping[str, Any], escape: Callable[[str], str]) -> list[str]:
    """Write tables and verdicts as lines of Markdown; none where no task was asked.

    Args:
        document: the document of a comparison.
        escape: escapes a sentence for Markdown.
    """
    if not (tables := task_tables(document)):
        return []
    lines = ["## Tasks", "", task_protocol(document), ""]
    for title, rows in tables.items():
        cells = [HEAD, tuple("---" for _ in HEAD), *(tuple(map(markdown, row)) for row in rows)]
        lines += [f"### {markdown(title)}", "", *(f"| {' | '.join(row)} |" for row in cells), ""]
    return [*lines, *(f"* {escape(sentence)}" for sentence in task_sentences(document)), ""]


def task_page(document: Mapping[str, Any]) -> str:
    """Write tables and verdicts as a part of an HTML page; empty where no task was asked."""
    if not (tables := task_tables(document)):
        return ""
    from jinja2 import Environment

    part = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PART)
    return part.render(protocol=task_protocol(document), head=HEAD, tables=tables, sentences=task_sentences(document))


_PART = """<h2>Tasks</h2>
<p>{{ protocol }}</p>
{% for title, rows in tables.items() %}
<h3>{{ title }}</h3>
<div class="wide"><table>
<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endfor %}
<ul>
{% for sentence in sentences %}
<li>{{ sentence }}</li>
{% endfor %}
</ul>
"""
