"""What a run cost beyond plain LoRA, in seconds and memory, from its log and the provenance of its plan."""

from collections.abc import Iterable, Mapping, Sequence
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
        ``seconds`` of the whole run (planning, loading, evaluation and saving included; None if it was not logged),
        ``train_seconds``, ``overhead_seconds`` in all and by ``work``, the ``scoring_seconds`` of the plan where they
        are known, whether the run ``planned_here``, ``memory``: bytes by kind when training began and at most, and
        ``memory_by_work``: the peak of the process that scored for ``planning``, that by the end of
        ``scoring_samples``, the statistics of ``observing``, and by how much ``allocating`` raised the peak.
    """
    first, last = log[0], log[-1]
    total = number(last.get("overhead_seconds")) or 0.0
    work = {key: value for key in WORK if (value := number(_mapping(last, "overhead").get(key)))}
    memory, peak = _most_by_work(log), _most(_sizes(line.get("peak_memory")) for line in log)
    made = number(provenance.get("planning_seconds"))
    # An earlier version did not tell where the plan was from; then the seconds that it took when it was made do.
    soon_enough = made is not None and made <= work.get("planning", 0.0) + 1.0
    planned_here = soon_enough and first.get("plan_origin", "scored") == "scored"
    scored = _sizes(provenance.get("calibration_peak_memory"))
    if scored and planned_here and not provenance.get("statistics_reused"):
        memory["planning"], peak = scored, _most([peak, scored])
    after_planning = number(last.get("seconds"))
    return {
        "seconds": None if after_planning is None else after_planning + work.get("planning", 0.0),
        "train_seconds": train_seconds,
        "overhead_seconds": total,
        "work": work or ({"all": total} if total else {}),
        "scoring_seconds": number(provenance.get("calibration_seconds")),
        "planning_seconds": made,
        "planned_here": planned_here,
        "memory": {
            "before_training": _sizes(first.get("peak_memory")),
            "whole_run": peak,
        },
        "memory_by_work": memory,
    }


def cost_rows(costs: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Build the rows of the ledger: the work, its seconds, their share of the whole run, and its memory."""
    whole = costs["seconds"] or costs["train_seconds"]
    rows = [
        (WORK[work], _seconds(seconds), _share(seconds, whole), _memory(work, costs))
        for work, seconds in costs["work"].items()
    ]
    if len(rows) != 1:
        spent = costs["overhead_seconds"]
        rows.append(("in all, which plain LoRA has not", _seconds(spent), _share(spent, whole), ""))
    if whole:
        name = "the whole run, with loading, evaluation and saving" if costs["seconds"] else "training"
        rows.append((name, _seconds(whole), "", ""))
    return rows


def cost_notes(costs: Mapping[str, Any]) -> list[str]:
    """List what a reader of the ledger should know besides."""
    notes = []
    made = costs["planning_seconds"]
    if made and not costs["planned_here"]:
        notes.append(f"the plan took {made:.1f} s when it was made; this run did not have to make it anew")
    elif costs["scoring_seconds"]:
        notes.append(f"of planning, {costs['scoring_seconds']:.1f} s were passes over the calibration rows")
    before, whole = costs["memory"]["before_training"], costs["memory"]["whole_run"]
    for kind, name in (("host", "main memory"), ("device", "device memory")):
        if whole.get(kind):
            least = f"{_size(before[kind])} when training began, " if before.get(kind) else ""
            notes.append(f"peak of {name}: {least}{_size(whole[kind])} over the whole run")
    return notes


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.1f} s"


def _share(seconds: float, whole: float | None) -> str:
    return f"{seconds / whole:.1%}" if whole else ""


def _size(size: float) -> str:
    if size >= 2**27:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**17 else f"{size / 2**10:.0f} KiB"


def _memory(work: str, costs: Mapping[str, Any]) -> str:
    """Describe what a work held at most, and its share of the peak of the whole run."""
    held, whole = costs["memory_by_work"].get(work, {}), costs["memory"]["whole_run"]
    name = {"observing": "statistics of", "allocating": "raised the peak by"}.get(work, "peak of")
    return ", ".join(
        f"{name} {_size(size)}{' on the device' if kind == 'device' else ''}"
        + (f" ({size / whole[kind]:.1%} of the run's peak)" if whole.get(kind) else "")
        for kind, size in held.items()
    )


def _most_by_work(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Find what each work held at most; a run that was resumed begins to count anew."""
    by_work = {work: _most(_sizes(_mapping(line, "memory").get(work)) for line in log) for work in WORK}
    return {work: most for work, most in by_work.items() if most}


def _most(sizes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    most: dict[str, float] = {}
    for each in sizes:
        most |= {kind: max(size, most.get(kind, 0.0)) for kind, size in each.items()}
    return most


def _sizes(told: Any) -> dict[str, float]:
    told = told if isinstance(told, Mapping) else {}
    return {kind: value for kind in ("host", "device") if (value := number(told.get(kind))) is not None}


def _mapping(line: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = line.get(key)
    return value if isinstance(value, Mapping) else {}
