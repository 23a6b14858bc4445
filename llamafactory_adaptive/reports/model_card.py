"""The section of the model card about adaptive ranks."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llamafactory_adaptive.files import replacing
from llamafactory_adaptive.ranks.plan import RankPlan
from llamafactory_adaptive.reports.plaintext import markdown
from llamafactory_adaptive.reports.plots import HEATMAP_FILE


if TYPE_CHECKING:
    pass
from llamafactory_adaptive.reports.tables import totals, type_rows


_CARD_START, _CARD_END = "<!-- llamafactory-adaptive: ranks -->", "<!-- /llamafactory-adaptive -->"


# From the last start before an end: a start that a person left alone takes no text with it.
_CARD = re.compile(f"{_CARD_START}(?:(?!{_CARD_START}).)*?{_CARD_END}", re.DOTALL)


def card_section(plan: RankPlan) -> str:
    """Write the Markdown section for the model card, between markers by which a later run replaces it."""
    rows = type_rows(plan, markdown)
    table = ["| " + " | ".join(row) + " |" for row in rows]
    table.insert(1, "|" + " --- |" * len(rows[0]))
    body = [f"## Adaptive ranks: {markdown(plan.method)}", "", *table, "", *(f"- {line}" for line in totals(plan))]
    note = f"A plain PEFT LoRA adapter; ranks per module are in `adapter_config.json`. ![ranks]({HEATMAP_FILE})"
    return "\n".join([_CARD_START, *body, "", note, _CARD_END])


def update_card(path: Path, plan: RankPlan) -> None:
    """Append the section to a model card, or replace the one of an earlier run; other text stays.

    Bytes that are not UTF-8 stay as they are, too.
    """
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    section, first, *more = card_section(plan), *_CARD.split(text)
    if more:
        text = first + section + "".join(more)
    else:
        text = text.rstrip() + "\n\n" + section + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
