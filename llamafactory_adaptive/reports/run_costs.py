"""What a run cost beyond plain LoRA, in seconds and memory, from its log and the provenance of its plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from llamafactory_adaptive.reports.values import number


WORK = {
    "planning": "planning, before the base model was loaded for training",
    "scoring_samples": "scoring training samples",
    "observing": "observing gradients, extra passes included",
    "allocating": "choosing ranks",
    "before": "before the run was resumed (an earlier version told only the sum)",
    "all": "finding ranks and scoring samples (this version of the log tells only the sum)",
}


def run_costs(
    log: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any], train_seconds: float | None
) -> dict[str, Any]:
    """Collect what a run cost.

    Args:
        log: parsed lines of the run's log, at least one.
        provenance: provenance of its plan.
        train_seconds: seconds of the training, as the Trainer measured them.

    Returns:
        ``seconds`` of the whole run (planning, loading and saving included; None if it was not logged),
        ``train_seconds``, ``overhead_seconds`` in all and by ``work``, the ``scoring_seconds`` of the plan where they
        are known, whether scores were ``re-used``, and ``memory``: bytes by kind at the start and at the end.
    """
    first, last = log[0], log[-1]
    total = number(last.get("overhead_seconds")) or 0.0
    work = {key: value for key in WORK if (value := number(_mapping(last, "overhead").get(key)))}
    after_planning = number(last.get("seconds"))
    return {
        "seconds": None if after_planning is None else after_planning + work.get("planning", 0.0),
        "train_seconds": train_seconds,
        "overhead_seconds": total,
        "work": work or ({"all": total} if total else {}),
        "scoring_seconds": number(provenance.get("calibration_seconds")),
        "planning_seconds": number(provenance.get("planning_seconds")),
        "memory": {
            "before_training": _bytes(first),
            "whole_run": _bytes(last),
        },
    }


def cost_rows(costs: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Build the rows of the ledger: the work, its seconds, and its share of the whole run."""
    whole = costs["seconds"] or costs["train_seconds"]
    rows = [(WORK[work], _seconds(seconds), _share(seconds, whole)) for work, seconds in costs["work"].items()]
    if len(rows) != 1:
        spent = costs["overhead_seconds"]
        rows.append(("in all, which plain LoRA has not", _seconds(spent), _share(spent, whole)))
    if whole:
        name = "the whole run, loading and saving included" if costs["seconds"] else "training"
        rows.append((name, _seconds(whole), ""))
    return rows


def cost_notes(costs: Mapping[str, Any]) -> list[str]:
    """List what a reader of the ledger should know besides."""
    notes = []
    made, spent = costs["planning_seconds"], costs["work"].get("planning", 0.0)
    if made and made > spent + 1.0:
        notes.append(f"the plan took {made:.1f} s when it was made; this run did not have to make it anew")
    elif costs["scoring_seconds"]:
        notes.append(f"of planning, {costs['scoring_seconds']:.1f} s were passes over the calibration rows")
    before, whole = costs["memory"]["before_training"], costs["memory"]["whole_run"]
    for kind, name in (("host", "main memory"), ("device", "device memory")):
        if whole.get(kind):
            least = f"{_gigabytes(before[kind])} when training began, " if before.get(kind) else ""
            notes.append(f"peak of {name}: {least}{_gigabytes(whole[kind])} over the whole run")
    return notes


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.1f} s"


def _share(seconds: float, whole: float | None) -> str:
    return f"{seconds / whole:.1%}" if whole else ""


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def _bytes(line: Mapping[str, Any]) -> dict[str, float]:
    return {kind: value for kind in ("host", "device") if (value := number(_mapping(line, "peak_memory").get(kind)))}


def _mapping(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = line.get(key)
    return value if isinstance(value, Mapping) else {}
