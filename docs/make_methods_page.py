"""Write the tables of docs/methods.md from the recorded benchmarks: ``python docs/make_methods_page.py``."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


PAGE = Path(__file__).with_name("methods.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def page(text: str) -> str:
    """Give the page's text with every table, between its marks, made anew."""
    for name, table in TABLES.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
        text = pattern.sub("\n".join([marks[0], *table(), marks[1]]).replace("\\", r"\\"), text)
    return text


def _read(name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return held


AGAINST = {
    "lora": "against plain LoRA",
    "published": "against `published`",
    "base": "against the arm without the part",
}


def _quality(name: str, rank: str, *rivals: str) -> Callable[[], Iterator[str]]:
    """Tabulate the arms of the benchmark of methods at one budget; ``rivals`` are what they are compared with."""

    def table() -> Iterator[str]:
        rows = _read(name)["results_by_rank"][rank]
        told = [rival for rival in rivals if any(f"over_{rival}" in row for row in rows.values())]
        heads = ["arm", "best rate", "held-out loss", *(AGAINST[rival] for rival in told), "components changed",
                 "seeds' ranks"]  # fmt: skip
        yield f"| {' | '.join(heads)} |"
        yield "| --- |" + " --- |" * (len(heads) - 1)
        for arm, row in rows.items():
            edge = " (end of the grid)" if row["rate_at_the_edge"] else ""
            changed = f"{row['components_changed']:.0f}" if "components_changed" in row else ""
            agreement = row.get("rank_correlation_of_seeds")
            cells = [arm, f"{row['rate']:g}{edge}", f"{row['loss']:.4f}",
                     *(_against(row.get(f"over_{rival}")) for rival in told), changed,
                     "" if agreement is None else f"{agreement:.2f}"]  # fmt: skip
            yield f"| {' | '.join(cells)} |"

    return table


def _against(over: dict[str, Any] | None) -> str:
    """Write a paired difference, after the name of the arm it is against where each row has another."""
    if over is None:
        return ""
    return (f"{over['base']}: " if "base" in over else "") + _difference(over)


def _difference(over: dict[str, Any]) -> str:
    """Write a paired difference with its interval; bold where Holm's correction leaves it below 5 %."""
    words = f"{over['mean']:+.4f}" + (f" ({over['low']:+.4f} to {over['high']:+.4f})" if "low" in over else "")
    words = f"**{words}**" if over.get("p_holm", 1.0) < 0.05 else words
    return words + (", equivalent" if over["equivalent"] else "")


# What was supposed after first trials, the arms that test it (each against the arm without the part), and
# what came of it, in words.
HYPOTHESES: list[tuple[str, str, list[str], str]] = [
    ("H1", "S x U in place of S / U closes most of the gap of IGU-LoRA to plain LoRA",
     ["published, product", "published, off, product"],
     "**Yes** under shrinkage, where S / U measures the draws; without it there is no gap, and it matters little"),
    ("H2", "the drawn strength taken out of scores makes seeds agree more on ranks, but helps the loss only if the "
     "adapter's strength is mended as well",
     ["published, descaled", "published, descaled, mended", "corrected, shrink, mended, not descaled"],
     "Ranks **yes**; the loss falls without mending, so that half is **refuted**. Where S alone is scored it "
     "matters little"),
    ("H3", "an adapter that trained under shrinkage is too strong, and better at 0.61 of lambda when shrinkage ends",
     ["published, shrunk to the end, mended", "corrected, shrunk to the end, not mended"],
     "**Yes** where nothing is trained afterwards, of `corrected` beyond doubt; where training goes on it costs"),
    ("H4", "shrinkage itself costs quality", ["published, off", "corrected, shrink"], "**Yes**, most of all parts"),
    ("H5", "IGU-LoRA's best rate is up to 12 times LoRA's, or lambda = 1 makes one rate serve both",
     ["published, off", "published, off, LoRA's start", "corrected, gaussian start"],
     "**Partly**: four times LoRA's here, and on SmolLM2 without shrinkage (with it LoRA's own); its start does not "
     "bring it nearer"),
    ("H6", "a bonus for components in use, or returns from lambda 0, halve the returns without loss",
     ["published, off, hysteresis", "published, off, no returns", "corrected, returns from lambda zero"],
     "A bonus of 0.1 **yes**; returns from lambda 0 **no**. Without returns it gains"),
    ("H7", "the regulariser's weight (0, 0.1, 1) does not matter",
     ["published, off, no regulariser", "corrected, regulariser 0.1", "corrected, published regulariser"],
     "**Yes**, within 0.5 %"),
    ("H8", "epsilon relative to the median of S frees the masks of `lora_alpha`", ["published, off, relative epsilon"],
     "**Yes**, by a test at alpha 8, 16 and 64; the loss is the same"),
    ("H9", "without schedule or score: a cut by norms after training at twice the rank is as good",
     ["lora of twice the rank, cut by norm"], "**Refuted**"),
    ("H10", "the published start harms nothing",
     ["published, off, LoRA's start", "corrected, gaussian start"], "**Yes**: LoRA's start is not the better one"),
]  # fmt: skip


def _hypotheses() -> Iterator[str]:
    """Tabulate what was supposed of IGU-LoRA, and what came of it."""
    rows = _read("method_quality")["results_by_rank"]["4"]
    yield "| | supposed | measured: difference in loss, and what changes | so |"
    yield "| --- | --- | --- | --- |"
    for name, claim, arms, verdict in HYPOTHESES:
        yield f"| {name} | {claim} | {'; '.join(_evidence(arm, rows) for arm in arms)} | {verdict} |"


def _evidence(arm: str, rows: dict[str, dict[str, Any]]) -> str:
    """Write an arm's difference to the one without the part, with rates, returns and agreement of seeds."""
    row = rows[arm]
    over = row["over_base"]
    base = rows[over["base"]]
    figures = [f"rate {base['rate']:g} to {row['rate']:g}"]
    if "components_returned" in row and "components_returned" in base:
        figures.append(f"returns {base['components_returned']:.0f} to {row['components_returned']:.0f}")
        seeds = [each["rank_correlation_of_seeds"] for each in (base, row)]
        figures.append(f"seeds' ranks {seeds[0]:.2f} to {seeds[1]:.2f}")
    return f"`{arm}` less `{over['base']}` {_difference(over)} ({', '.join(figures)})"


def _stability() -> Iterator[str]:
    """Tabulate how far a method's ranks agree with its first run where one thing is changed."""
    agreements = _read("stability")["agreement_with_first_run"]
    changes = list(dict.fromkeys(change for rows in agreements.values() for change in rows))
    yield f"| method | {' | '.join(changes)} |"
    yield "| --- |" + " --- |" * len(changes)
    for method, rows in agreements.items():
        cells = (_agreement(rows[change]) if change in rows else "" for change in changes)
        yield f"| {method} | {' | '.join(cells)} |"


def _agreement(row: dict[str, Any]) -> str:
    """Write the shares of modules at the same rank and within one of it, and a correlation where ranks differ."""
    correlation = "" if row["correlation"] is None else f", {row['correlation']:.2f}"
    return f"{row['same_rank']:.0%} / {row['within_one']:.0%}{correlation}"


def _memory() -> Iterator[str]:
    """Tabulate what a search holds beside the adapter, in bytes per trainable element."""
    columns = ("weights", "gradients", "AdamW", "statistics", "sums over samples", "weights of a pass")
    yield f"| method | {' | '.join(columns)} | the last three over AdamW |"
    yield "| --- |" + " --- |" * (len(columns) + 1)
    for method, row in _read("memory")["bytes_per_element"].items():
        parts = ("weights", "gradients", "adam", "statistics", "sums_over_samples", "weights_of_a_pass")
        cells = [f"{row[part]:.3g}" for part in parts]
        yield f"| {method} | {' | '.join(cells)} | {row['extra_over_adam']:.0%} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "small Llama, rank 4": _quality("method_quality", "4", "lora", "published", "base"),
    "small Llama, rank 2": _quality("method_quality", "2", "lora", "base"),
    "small Llama, rank 1": _quality("method_quality", "1", "lora", "base"),
    "hypotheses": _hypotheses,
    "SmolLM2, rank 8": _quality("method_quality_smollm2", "8", "lora", "published", "base"),
    "stability": _stability,
    "memory": _memory,
}


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
