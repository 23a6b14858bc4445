"""Write docs/worth-it.md and the answer in README.md from what was recorded: ``python docs/make_worth_it_page.py``.

``make bench-report`` does the same after it has made the recorded figures anew from the ledgers.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamafactory_adaptive.comparison.arms import CONTROL, PLAIN
from llamafactory_adaptive.comparison.pages import markdown_sentence, sentences
from llamafactory_adaptive.comparison.task_pages import (
    COMMONEST,
    commonest,
    task_protocol,
    task_sentences,
    task_tables,
)
from llamafactory_adaptive.comparison.task_pages import HEAD as TASK_HEAD
from llamafactory_adaptive.reports.plaintext import markdown


DOCS = Path(__file__).parent
PAGE, README, IMAGES = DOCS / "worth-it.md", DOCS.parent / "README.md", DOCS / "images"
RESULTS = DOCS.parent / "benchmarks" / "results"
MARKS = "<!-- answer -->", "<!-- end of answer -->"
TITLES = {"data_limited": "GSM8K, few rows", "capacity_limited": "GSM8K, more rows", "boolq": "BoolQ", "arc": "ARC"}
PLOTS = {"difference": "Difference to plain LoRA", "rates": "Loss over the learning rate",
         "ranks": "Mean rank by layer and module type"}  # fmt: skip
VERDICTS = ("better", "equivalent", "not decided", "worse", "diverged")
HEAD = """# Does it pay? What we found

Made by `docs/make_worth_it_page.py` from `benchmarks/results/worth_it_*.json`, whose figures `make bench-report` makes
anew from the ledgers beside them. Every part is one run of `make worth-it`, which is
[`llamafactory-adaptive compare`](comparing.md) on SmolLM2-135M: one budget, the best learning rate of each arm chosen
on one half of the held-out rows, other seeds and the other half for the verdict. Intervals are of 95 %, and those of
losses cover that another seed might have chosen another rate. Verdicts are corrected for the number of arms of their
part (Holm), not for that of parts: among so many, a single one may be chance. An arm is better with less loss, below
0 %, and with more right answers, above 0 points. `lora_alpha` is twice the rank everywhere and was not tuned. Parts
differ in arms and rates, as each takes hours; they were made while this version was written, so that arms of one part
may have run with different states of the code.
"""
Result = dict[str, Any]


def results() -> dict[str, Result]:
    """Read the recorded comparisons, by name: the primary regime first, smaller budgets of a regime last."""
    held = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("worth_it_*.json")}
    regimes = list(TITLES)
    return dict(sorted(held.items(), key=lambda item: (regimes.index(item[1]["regime"]), -item[1]["rank"])))


def page() -> str:
    """Give the text of the page; empty where nothing is recorded."""
    parts = [line for name, held in results().items() for line in _section(name, held)]
    return "\n".join([HEAD, *parts]) if parts else ""


def with_answer(text: str) -> str:
    """Give README's text with the answer, between its marks, made anew."""
    pattern = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    return pattern.sub("\n".join([MARKS[0], *_answer(), MARKS[1]]).replace("\\", r"\\"), text)


def image(name: str, plot: str) -> Path:
    """Give the path of a plot of a result."""
    return IMAGES / f"{name}_{plot}.svg"


def _title(held: Result) -> str:
    return f"{TITLES[held['regime']]}, rank {held['rank']}"


def _section(name: str, held: Result) -> Iterator[str]:
    made = held["comparison"]
    yield f"## {_title(held)}\n"
    yield _what(held)
    yield f"\n{_count(made)}\n"
    yield "| arm | best rate | held-out loss | against plain LoRA | against random ranks | parameters |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield from map(_row, made["arms"])
    in_table = {verdict["words"] for arm in made["arms"] for verdict in arm.get("verdicts", {}).values()}
    yield from ["", *_remedies(made)]
    yield from (f"* {_readable(said)}" for said in sentences(made) if said not in in_table)
    for plot, title in PLOTS.items():
        if image(name, plot).is_file():
            yield f"\n![{title}](images/{image(name, plot).name})"
    yield ""
    yield from _answered(made)


def _answered(made: Mapping[str, Any]) -> Iterator[str]:
    """Tabulate how the adapters answered; nothing where they were not asked."""
    if "tasks" not in made:
        return
    for title, rows in task_tables(made).items():
        yield f"### Answers: {_readable(title)}\n"
        cells = [TASK_HEAD, ("---",) * len(TASK_HEAD), *(tuple(map(_readable, row)) for row in rows)]
        yield from (f"| {' | '.join(row)} |" for row in cells)
        yield ""
    yield f"{task_protocol(made)}\n"
    judged = [(f"{arm['name']} in {task}", of) for arm in made["tasks"]["arms"]
              for task, of in arm.get("verdicts", {}).items()]  # fmt: skip
    yield from (f"* {markdown(name)}: {remedy}" for name, of in judged
                if PLAIN in of and (remedy := of[PLAIN]["what_would_decide"]))  # fmt: skip
    in_tables = {verdict["words"] for _, of in judged for verdict in of.values()}
    yield from (f"* {_readable(said)}" for said in task_sentences(made) if said not in in_tables)
    yield ""


def _readable(text: str) -> str:
    """Escape a text for Markdown, unless it holds words, figures and marks that mean nothing there."""
    return text if re.fullmatch(r"[\w %±+.,:;()'/=-]*", text) else markdown_sentence(text)


def _remedies(made: Mapping[str, Any]) -> Iterator[str]:
    """List what would decide about the arms that are not decided against plain LoRA."""
    for name, verdict in _compared(made):
        if remedy := verdict["what_would_decide"]:
            yield f"* {markdown(name)}: {remedy}"


def _what(held: Result) -> str:
    made = held["comparison"]
    rows, design = made["held_out_rows"], made["design"]
    data = "generated rows" if held["data"] == "generated" else f"rows of {held['data'].replace('+', ' and ')}"
    bare = ", where a module may have no adapter" if made["settings"].get("adaptive_min_rank") == 0 else ""
    shared = ", which runs shared, so that no times are told" if "cpu,cpu" in held["command"] else ""
    chosen = "1 seed" if design["rate_seeds"] == 1 else f"{design['rate_seeds']} seeds"
    return (
        f"{held['steps']} steps of {held['batch_size']} {data} of at most {held['longest_row']} tokens{bare}, "
        f"{made['training_rows']:,} in all; {rows['dev']} held-out rows choose, over {chosen}, {rows['test']} judge, "
        f"over {design['seeds']} others; {held['device']}{shared}, {held['date']}. What was to matter is "
        f"{100 * made['smallest_effect']:g} % of plain LoRA's loss. `{held['command']}`"
    )


def _compared(made: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(arm["name"], arm["verdicts"][PLAIN]) for arm in made["arms"] if PLAIN in arm.get("verdicts", {})]


def _count(made: Mapping[str, Any]) -> str:
    counts = Counter(verdict["verdict"] for _, verdict in _compared(made))
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"Of {counts.total()} arms against plain LoRA at its best rate: {said}."


def _row(arm: Mapping[str, Any]) -> str:
    name = markdown(arm["name"])
    if "loss" not in arm:
        why = "diverged at every rate" if "diverged" in arm else f"could not be run: {markdown(arm['failed'])}"
        return f"| {name} | {why} | | | | |"
    rate = f"{arm['best']['rate']:g}" + (" (end of the grid)" if arm["best_at_the_edge"] else "")
    against = " | ".join(_interval(arm["verdicts"].get(rival)) for rival in (PLAIN, CONTROL))
    return f"| {name} | {rate} | {arm['loss']:.4f} | {against} | {arm['parameters']:,} |"


def _interval(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None or verdict["difference"] is None:
        return ""
    value, low, high = (f"{100 * verdict['difference']['relative'][key]:+z.2f}" for key in ("value", "low", "high"))
    return f"{value} % ({low} to {high}), {verdict['verdict']}"


def _answer() -> Iterator[str]:
    """Tabulate all arms against plain LoRA, one column for each recorded comparison."""
    found = results()
    if not found:
        return
    told = {_title(held): dict(_compared(held["comparison"])) for held in found.values()}
    arms = list(dict.fromkeys(arm for verdicts in told.values() for arm in verdicts))
    yield f"\n| loss against plain LoRA | {' | '.join(told)} |"
    yield "| --- |" + " --- |" * len(told)
    for arm in arms:
        yield f"| {markdown(arm)} | {' | '.join(_cell(verdicts.get(arm)) for verdicts in told.values())} |"
    yield from _accuracies(list(found.values()))
    counts = (f"{_title(held)}: {_count(held['comparison'])}" for held in found.values())
    yield f"\n{' '.join(counts)}"
    yield "Each arm at its own best rate; rates, intervals, ranks and reservations: [what we found](docs/worth-it.md)."


def _accuracies(found: Sequence[Result]) -> Iterator[str]:
    """Tabulate accuracies of all arms against plain LoRA, a column for each task and budget; nothing without tasks."""
    asked = [(held["rank"], held["comparison"]["tasks"]) for held in found if "tasks" in held["comparison"]]
    columns = [(task, rank, {arm["name"]: arm for arm in tasks["arms"]})
               for rank, tasks in asked for task in tasks["questions"]]  # fmt: skip
    if not columns:
        return
    yield f"\n| accuracy against plain LoRA | {' | '.join(f'{task}, rank {rank}' for task, rank, _ in columns)} |"
    yield "| --- |" + " --- |" * len(columns)
    for name in dict.fromkeys(arm["name"] for _, tasks in asked for arm in tasks["arms"]):
        cells = (_points(arms.get(name, {}), task) for task, _, arms in columns)
        yield f"| {markdown(name)} | {' | '.join(cells)} |"
    shares = (commonest(tasks, task) for _, tasks in asked for task in tasks["questions"])
    blind = ("" if share is None else f"{100 * share:.1f} %" for share in shares)
    yield f"| {COMMONEST} | {' | '.join(blind)} |"


def _points(arm: Mapping[str, Any], task: str) -> str:
    """Tell the accuracy of plain LoRA, and by how many points that of another arm differs."""
    if "accuracy" not in arm:
        return "could not be evaluated" if "failed" in arm else ""
    if arm["name"] == PLAIN:
        return f"{100 * arm['accuracy'][task]['value']:.1f} %"
    if (verdict := arm["verdicts"].get(task, {}).get(PLAIN)) is None:
        return ""
    return f"{100 * verdict['difference']['value']:+z.1f} points, {verdict['verdict']}"


def _cell(verdict: Mapping[str, Any] | None) -> str:
    if verdict is None:
        return ""
    if verdict["difference"] is None:
        return str(verdict["verdict"])
    return f"{100 * verdict['difference']['relative']['value']:+z.2f} %, {verdict['verdict']}"


def write() -> None:
    """Write both pages; without anything recorded there is no page of findings."""
    README.write_text(with_answer(README.read_text(encoding="utf-8")), encoding="utf-8")
    if text := page():
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
