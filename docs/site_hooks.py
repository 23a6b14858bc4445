"""What mkdocs does besides when it builds the site: pages from outside of docs/, links between them, no flow charts.

README, the pages of the examples and of the harness, and those for contributors stay where readers of a checkout look
for them, and are pages of the site as well. A link to a file that is no page becomes its path, since the site has no
repository to lead to; a link to nothing is left as it is, and ends the build.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "README_zh.md": "zh.md",
    "examples/README.md": "examples.md",
    "examples/inference/README.md": "examples-inference.md",
    "eval/README.md": "harness.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
OPTIONAL = {"worth-it.md"}  # made once something is recorded
SOURCES = {page: source for source, page in OUTSIDE.items()}
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?\[(?P<text>[^\]]*)\])\((?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\">\s]+)")
NODE = r'(\w+)(?:\["([^"]*)"\])?'


def on_config(config: Any) -> Any:
    """Leave optional pages out of the navigation as long as they are not there."""
    config["nav"] = _present(config["nav"])
    return config


def _present(entries: list[Any]) -> list[Any]:
    kept = []
    for entry in entries:
        ((title, to),) = entry.items()
        if isinstance(to, list):
            kept.append({title: _present(to)})
        elif to not in OPTIONAL or (ROOT / "docs" / to).is_file():
            kept.append(entry)
    return kept


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links for the site, outside of code, and show a flow chart as the table of its arrows."""
    source = SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = FENCE.split(markdown)
    return "".join(_chart(part) if part.startswith("```") else rewritten(part, source) for part in parts)


def rewritten(text: str, source: str) -> str:
    """Rewrite the links of a text, which stands in the file ``source`` of the repository."""

    def link(found: re.Match[str]) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        if ":" in path:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in OUTSIDE:
            return f"{found[1]}({OUTSIDE[target]}{anchor})"
        if target.startswith("docs/"):
            return f"{found[1]}({target.removeprefix('docs/')}{anchor})"
        if not (ROOT / target).exists():
            return found[0]
        return found["text"] if target in found["text"] else f"{found['text']} (`{target}`)"

    return LINK.sub(link, text)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """End the build where a page would fetch something from elsewhere."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches {found[1]}")
    return output


def _chart(fence: str) -> str:
    return "\n".join(_arrows(fence)) if fence.startswith("```mermaid") else fence


def _arrows(chart: str) -> Iterator[str]:
    """Tabulate a flow chart: each node, what it is, and what its arrows point to. To draw it takes a script."""
    arrows = re.findall(rf"{NODE} --> {NODE}", chart)
    labels = {name: label for a, said, b, too in arrows for name, label in ((a, said), (b, too)) if label}
    yield "| room | what it is | imports |"
    yield "| --- | --- | --- |"
    for name, label in labels.items():
        rooms, _, meaning = label.partition(": ")
        targets = [labels[b].partition(":")[0] for a, _, b, _ in arrows if a == name]
        short = ("what is below" if "," in target else f"`{target}`" for target in targets)
        listed = ", ".join(f"`{room}`" for room in rooms.split(", "))
        yield f"| {listed} | {meaning} | {', '.join(short)} |"
