"""A page to browse samples: ``python -m eval.samples_page FOLDER`` makes ``samples.html`` of ``samples.jsonl``.

The page is one file that loads nothing else. Texts of models are data in it, never markup: they are in a JSON block
that none of their characters can end, and are shown as text by one script, the only one that the page's policy lets
run.

Exit codes: 0 done, 2 user error (one message on stderr), 130 interrupted.
"""

import argparse
import base64
import hashlib
import html
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.exits import exit_code
from eval.reading import MAX_SAMPLE, field, numbered_rows, read_object
from eval.results import RESULTS_FILE, SAMPLES_FILE, write_atomically


PAGE_FILE = "samples.html"
_PARTS = Path(__file__).parent / "page"
# Characters that control a terminal or the direction of text, or are invisible; they are shown by their numbers.
_HIDDEN = {
    code: f"[U+{code:04X}]"
    for code in (*range(32), *range(0x7F, 0xA0), *range(0x200B, 0x2010), *range(0x2028, 0x202F),
                 *range(0x2060, 0x2070), 0xFEFF, *range(0xD800, 0xE000))
    if chr(code) not in "\n\t"
}  # fmt: skip
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<nav>
<select id="task" aria-label="task"><option value="">every task</option></select>
<select id="model" aria-label="model"><option value="">every model</option></select>
<select id="verdict" aria-label="verdict">
<option value="">right and wrong</option>
<option value="right">right</option>
<option value="wrong">wrong</option>
<option value="disagree">models or answers disagree</option>
</select>
<input id="search" type="search" placeholder="search texts" aria-label="search texts">
<button id="back" type="button">back</button>
<button id="next" type="button">next</button>
<span id="count" role="status"></span>
</nav>
<main id="list"></main>
<noscript>This page needs its own script, which asks for nothing from the network.</noscript>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page of the folder named on the command line, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.samples_page", description="Make a page to browse samples.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=f"a run's --out, with {SAMPLES_FILE}")
    folder = parser.parse_args(argv).folder
    return exit_code((), lambda: print(f"written: {write_page(folder)}"))


def write_page(folder: Path) -> Path:
    """Write ``samples.html`` beside the ``samples.jsonl`` of a folder.

    Raises:
        EvalError: samples are missing or damaged, or the page cannot be written.
    """
    page = page_of_folder(folder)
    try:
        write_atomically(folder / PAGE_FILE, page)
    except OSError as error:
        raise EvalError(f"{folder / PAGE_FILE} cannot be written ({error.strerror})") from error
    return folder / PAGE_FILE


def _headlines(path: Path) -> dict[str, str]:
    """Read from the results by which metric answers to each task are right or wrong; empty without results."""
    scores = read_object(path).get("scores") if os.path.isfile(path) else None
    named = (
        [s for s in scores if isinstance(s, dict) and s.get("headline") is True] if isinstance(scores, list) else []
    )
    return {str(score.get("task")): str(score.get("metric")) for score in named}


def page_of_folder(folder: Path) -> str:
    """Build the page of a run's folder as text.

    Raises:
        EvalError: samples are missing or damaged.
    """
    samples = folder / SAMPLES_FILE
    if not os.path.isfile(samples):  # false, not an error, for a name too long as well
        raise EvalError(f"{samples} does not exist; run the evaluation with --log-samples")
    return page_of(samples, _headlines(folder / RESULTS_FILE), f"Samples of {folder.resolve().name}")


def page_of(samples: Path, headlines: Mapping[str, str], title: str) -> str:
    """Build the page of a file of samples as text.

    Args:
        samples: file of samples.
        headlines: per task, the metric by which an answer is right or wrong; where there is none, a sample's first.
        title: title of the page.
    """
    rows = _rows(samples, headlines)
    data = {
        "tasks": list(dict.fromkeys(row["task"] for row in rows)),
        "models": list(dict.fromkeys(answer["model"] for row in rows for answer in row["answers"])),
        "rows": rows,
    }
    script, style = ((_PARTS / name).read_text(encoding="utf-8") for name in ("samples.js", "samples.css"))
    policy = f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; base-uri 'none'; "
    return _PAGE.format(
        policy=html.escape(policy + "form-action 'none'"),
        title=html.escape(visible(title)),
        style=style,
        script=script,
        data=_in_script(data),
    )


def visible(text: str) -> str:
    """Replace characters that are invisible, or control a terminal or the direction of text, by their numbers."""
    return text.translate(_HIDDEN)


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _in_script(data: Any) -> str:
    """Encode data as ASCII JSON without the characters that begin tags, comments and references."""
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _rows(path: Path, headlines: Mapping[str, str]) -> list[dict[str, Any]]:
    """Group samples by task, seed and row, so that models and repeats are side by side."""
    groups: dict[tuple[str, int, int], dict[str, Any]] = {}
    for number, line in numbered_rows(path, MAX_SAMPLE):
        where = f"{path}:{number}"
        task, seed, row = (
            field(line, "task", str, where),
            field(line, "seed", int, where),
            field(line, "row", int, where),
        )
        texts = {name: visible(field(line, name, str, where)) for name in ("question", "target", "prompt")}
        shown = {"task": visible(task), "seed": seed, "row": row, **texts, "answers": []}
        answer = _answer(line, headlines.get(task), where)
        groups.setdefault((task, seed, row), shown)["answers"].append({**answer, "prompt": texts["prompt"]})
    seeds = {seed for _, seed, _ in groups}
    for shown in groups.values():
        _share_prompt(shown)
        shown["seeds"] = len(seeds) > 1
        shown["repeats"] = any(answer["repeat"] for answer in shown["answers"])
    return list(groups.values())


def _answer(line: Mapping[str, Any], headline: str | None, where: str) -> dict[str, Any]:
    metrics = field(line, "metrics", dict, where)
    values = {name: float(field(metrics, name, (int, float), where)) for name in metrics}
    by = headline if headline is not None and headline in values else str(next(iter(values), ""))
    response, extracted = line.get("response"), line.get("extracted")
    return {
        "model": visible(field(line, "model", str, where)),
        "repeat": field({"repeat": 0, **line}, "repeat", int, where),
        "right": values.get(by, 0.0) == 1,
        "by": visible(by),
        "metrics": visible(", ".join(f"{name} {value:g}" for name, value in values.items())),
        "response": visible(response if isinstance(response, str) else json.dumps(response, ensure_ascii=False)),
        "extracted": visible("; ".join(_readings(extracted, response))),
    }


def _readings(extracted: Any, response: Any) -> Iterator[str]:
    """Yield what each filter left of the response, except for filters that changed nothing."""
    for name, text in extracted.items() if isinstance(extracted, dict) else ():
        if text != response:
            yield f"{name} {str(text)[:200]}"


def _share_prompt(row: dict[str, Any]) -> None:
    """Store the prompt once for a row where every answer has the same one."""
    prompts = {answer["prompt"] for answer in row["answers"]}
    row["prompt"] = prompts.pop() if len(prompts) == 1 else None
    for answer in row["answers"] if row["prompt"] is not None else ():
        answer["prompt"] = None


if __name__ == "__main__":
    sys.exit(main())
