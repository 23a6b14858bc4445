"""Write docs/options.md, every YAML key with its help, from the options: ``python docs/make_options_page.py``."""

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamafactory_adaptive.config.arguments import PRUNING_KEYS, SEARCH_KEYS, AdaptiveArguments
from llamafactory_adaptive.methods import get_method, make_method, methods


PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

<!-- Made by docs/make_options_page.py from the options themselves; a test keeps it fresh. -->

Keys of a training YAML with `finetuning_type: adaptive`. `lora_rank` is the budget, `lora_alpha` over `lora_rank` the
scale (with `adalora`, over the rank that modules start at); every other key of LLaMA-Factory keeps its meaning. A key
that the chosen method does not read is refused.
"""


def page() -> str:
    """Give the page's text."""
    parts = [HEAD, "## For every method\n", *_table(AdaptiveArguments, "", skipped=PRUNING_KEYS + SEARCH_KEYS)]
    parts += [f"\n## For methods that find ranks while training ({_names('prune', 'reallocate', 'exchange')})\n"]
    parts += _table(AdaptiveArguments, "", kept=SEARCH_KEYS)
    parts += [f"\n## For methods that prune or exchange ({_names('prune', 'exchange')})\n"]
    parts += _table(AdaptiveArguments, "", kept=PRUNING_KEYS)
    for name in sorted(methods()):
        owner = get_method(name).Options
        if dataclasses.fields(owner):
            parts += [f"\n## `adaptive_method: {name}`\n", *_table(owner, f"{name}_")]
    return "\n".join(parts) + "\n"


def _names(*strategies: str) -> str:
    """List the methods of some strategies."""
    return ", ".join(name for name in sorted(methods()) if make_method(name, {}).traits.strategy in strategies)


def _table(owner: type[Any], prefix: str, kept: tuple[str, ...] = (), skipped: tuple[str, ...] = ()) -> Iterator[str]:
    yield "| key | default | meaning |"
    yield "| --- | --- | --- |"
    types = typing.get_type_hints(owner)
    for entry in dataclasses.fields(owner):
        name = prefix + entry.name
        if entry.name in skipped or (kept and entry.name not in kept):
            continue
        shown = str(entry.default).lower() if types[entry.name] is bool else entry.default
        default = "not set" if entry.default is None else f"`{shown}`"
        meaning = entry.metadata["help"].replace("|", "\\|")
        yield f"| `{name}` | {default} | {meaning} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
