"""Summaries of what was checked of a run's adapter: certificates of exports and cuts, scores on tasks."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import CERTIFICATE_FILE, CUT_FILE, read_mapping
from llamafactory_adaptive.reports.values import mappings, number, text


SCORES_FILE = "eval_results.json"  # of the harness in eval/; LLaMA-Factory calls its own losses so, too
_DEPTHS = ("", "*/", "*/*/")  # in the run's folder and below, where exports and scores are put


def certificates(folder: Path) -> list[dict[str, Any]]:
    """Summarise the certificates in a run's folder: of the exports below it, and of a cut of its adapter."""
    found = []
    for path, document in _documents(folder, (CERTIFICATE_FILE, CUT_FILE)):
        checks = [
            {
                "name": text(check.get("name")),
                "passed": check.get("passed") is True,
                "max_difference": number(check.get("max_difference")),
                "tolerance": number(check.get("tolerance")),
                "unit": text(check.get("unit")),
            }
            for check in mappings(document.get("checks"))
        ]
        if checks:
            facts = {key: text(document.get(key)) for key in ("server", "date")}
            passed = all(check["passed"] for check in checks)
            found.append({"file": str(path.relative_to(folder)), **facts, "passed": passed, "checks": checks})
    return found


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Summarise the scores on tasks in a run's folder: the headline metrics, and comparisons of the means."""
    found = []
    for path, document in _documents(folder, (SCORES_FILE,)):
        scores = [
            {
                **{key: text(score.get(key)) for key in ("model", "task", "metric")},
                **{key: number(score.get(key)) for key in ("value", "stderr", "n")},
            }
            for score in mappings(document.get("scores"))
            if score.get("headline") is True and number(score.get("value")) is not None
        ]
        if scores:
            file, protocol = str(path.relative_to(folder)), text(document.get("protocol"))
            found.append({"file": file, "protocol": protocol, "date": text(document.get("date")), "scores": scores,
                          "comparisons": _comparisons(document)})  # fmt: skip
    return found


def _comparisons(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = []
    for pair in mappings(document.get("comparisons")):
        difference = pair.get("mean_difference")
        if isinstance(difference, Mapping) and number(difference.get("value")) is not None:
            figures = {key: number(difference.get(key)) for key in ("value", "low", "high", "p_value")}
            pairs.append({"first": text(pair.get("first")), "second": text(pair.get("second")), **figures})
    return pairs


def _documents(folder: Path, names: tuple[str, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Read the files of these names in a folder and below, but for checkpoints; what cannot be read is left out."""
    for name in names:
        for path in sorted(found for depth in _DEPTHS for found in folder.glob(depth + name)):
            parts = path.relative_to(folder).parts
            if any(part.startswith(("checkpoint-", "_", ".")) for part in parts):
                continue
            try:
                yield path, read_mapping(path, name)
            except PlanError:
                continue
