"""Ledgers of comparisons as they are shipped in results/: small, without paths, and enough to make all figures anew.

A line of the shipped ledger says which run it is (arm, rate, alpha, seed, steps) and what came of it. Losses of rows
have five decimals, ranks are a list in the order of ``modules``, and answers to tasks a list for each. The figures are
made from these lines by the comparison's own code, never copied.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import record
from shipped_answers import answers_in, answers_of, tasks_anew

from llamafactory_adaptive.comparison.arms import GIVEN, Arm, GridPoint, run_settings
from llamafactory_adaptive.comparison.experiment import Design, Progress, Run
from llamafactory_adaptive.comparison.ledger import LEDGER, Ledger
from llamafactory_adaptive.comparison.pages import JSON_FILE
from llamafactory_adaptive.comparison.results import arm_results, document
from llamafactory_adaptive.comparison.secrets import without_secrets


Held = dict[str, Any]
DECIMALS = 5
CLOSE = 1e-6  # relative; sums may be taken in another order elsewhere
KEPT = ("status", "seconds", "training_seconds", "steps", "parameters", "parameters_of_one_rank")
HALVES = ("dev", "test")


def ledger_file(name: str) -> Path:
    """Give the path of the shipped ledger of a result."""
    return record.RESULTS / f"{name}.ledger.jsonl"


def from_folder(folder: Path, model: str) -> tuple[Held, list[Held]]:
    """Read a finished comparison, and return what is shipped of it: facts with figures, and lines of the ledger."""
    made = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    ledger = Ledger(folder / LEDGER).entries
    entries = [{"settings": json.loads(key), "result": result} for key, result in ledger.items()]
    found = dict(_lines_of_runs(entries, made))
    if not found:
        raise SystemExit(f"no line of the ledger in {folder} is a run of its {JSON_FILE}")
    modules = list(dict.fromkeys(name for line in found.values() for name in line["result"].get("ranks", ())))
    answers = answers_in(entries, made["tasks"]["digest"]) if "tasks" in made else {}
    lines = [
        {"settings": identity(run), "result": _slim(line["result"], modules) | answers_of(line, answers)}
        for run, line in found.items()
    ]
    tokens = _answer_tokens(folder, next(iter(found.values()))["settings"]["rows"])
    made["settings"] |= {"model_name_or_path": model, "dataset_dir": "<path>"}
    held = {"answer_tokens": tokens, "modules": modules, "comparison": {**made, "command": ""}}
    fresh = recomputed(held, {_key(line["settings"]): line["result"] for line in lines})
    differences = different(*([_reached(arm) for arm in each["arms"]] for each in (fresh, made)), 10.0**-DECIMALS)
    if differences := [*differences, *different(fresh.get("tasks"), made.get("tasks"))]:
        raise SystemExit(f"what would be shipped tells otherwise than {JSON_FILE}: {'; '.join(differences[:5])}")
    return _without_paths({**held, "comparison": without_ranks(fresh)}), _without_paths(lines)


def _without_paths(value: Any) -> Any:
    """Replace every absolute path in the texts of a document, such as that of the log of an arm that failed."""
    return change_texts(value, lambda text: re.sub(r"(?<![\w./:<])(?:/[^\s/'\",;)]+){2,}", "<path>", text))


def change_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text of a document; keys stay."""
    if isinstance(value, dict):
        return {key: change_texts(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [change_texts(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def without_ranks(made: Mapping[str, Any]) -> Held:
    """Leave out the rank of every module, of which the ledger tells, to keep the result short."""
    arms = [{key: value for key, value in arm.items() if key != "ranks"} for arm in made["arms"]]
    return {**made, "arms": arms}


def recomputed(held: Mapping[str, Any], lines: Mapping[str, Held]) -> Held:
    """Make the figures of all arms from lines of a shipped ledger, and put them in the place of those that are held.

    Args:
        held: a result; what its comparison holds besides figures of arms stays.
        lines: results of runs by :func:`identity`, as text.
    """
    made, tokens = held["comparison"], {half: np.array(counts) for half, counts in held["answer_tokens"].items()}

    def known(run: Run) -> Held | None:
        result = lines.get(_key(identity(run)))
        return None if result is None else _whole(result, held["modules"])

    def figure(outcome: Mapping[str, Any], half: str) -> float:
        return float(np.average(outcome[half], weights=tokens[half]))

    progress = Progress(design_of(made), arms_of(made), known, figure)
    progress.give_up_larger_arms()
    progress.failed |= {entry["name"]: entry["failed"] for entry in made["arms"] if "failed" in entry}
    fresh = document(arm_results(progress), held["answer_tokens"], made["smallest_effect"], {})
    anew = {"arms": fresh["arms"]}
    if "tasks" in made:
        anew["tasks"] = tasks_anew(made["tasks"], {arm.name: progress.finals(arm.name) for arm in progress.arms})
    return json.loads(json.dumps({**made, **anew}))


def _reached(arm: Mapping[str, Any]) -> Held:
    """Give the figures that rounded losses change by no more than they are rounded."""
    return {key: arm.get(key) for key in ("best", "loss", "losses", "parameters", "failed", "diverged")}


def read(name: str) -> tuple[Held, dict[str, Held]]:
    """Read a shipped result and its ledger."""
    held = json.loads((record.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return held, Ledger(ledger_file(name)).entries


def different(first: Any, second: Any, close: float = CLOSE, where: str = "") -> list[str]:
    """List the places at which two documents differ; numbers may by a share of ``close``."""
    if isinstance(first, dict) and isinstance(second, dict):
        parts = ((key, first.get(key), second.get(key)) for key in {**first, **second})
        return [said for key, *pair in parts for said in different(*pair, close, f"{where}/{key}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [said for index, pair in pairs for said in different(*pair, close, f"{where}/{index}")]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (first, second))
    same = math.isclose(first, second, rel_tol=close, abs_tol=close) if numbers else first == second
    return [] if same else [f"{where}: {first!r:.60} is not {second!r:.60}"]


def design_of(made: Mapping[str, Any]) -> Design:
    """Build the design that a document tells of."""
    held = made["design"]
    return Design(**{**held, "rates": tuple(held["rates"]), "alphas": tuple(held["alphas"])})


def arms_of(made: Mapping[str, Any]) -> list[Arm]:
    """Build the arms that a document tells of."""
    return [Arm(entry["name"], entry["settings"], entry["name"] == GIVEN) for entry in made["arms"]]


def identity(run: Run) -> Held:
    """Name a run without the settings that all runs have in common."""
    return {"arm": run.arm, **asdict(run.point), "seed": run.seed, "steps": run.steps}


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _lines_of_runs(entries: Sequence[Held], made: Mapping[str, Any]) -> Iterator[tuple[Run, Held]]:
    """Find the lines of a ledger that are runs of the document, by their settings."""
    from llamafactory_adaptive.bridge.comparison_checks import without_training_set

    own, given = _own_keys(made["settings"]), made["settings"]
    lines = {_key(entry["settings"]["settings"]): entry for entry in entries if "settings" in entry["settings"]}
    for arm, run in _runs(made):
        settings = run_settings(given, arm, run.point, run.seed, run.steps, own)
        if (line := lines.get(_key(without_secrets(without_training_set(settings))))) is not None:
            yield run, line


def _own_keys(given: Mapping[str, Any]) -> list[str]:
    from llamafactory_adaptive.bridge.arguments import our_keys
    from llamafactory_adaptive.cli.host import require_enabled

    require_enabled()
    return our_keys(given)


def _runs(made: Mapping[str, Any]) -> Iterator[tuple[Arm, Run]]:
    """List every run that the document may stand on."""
    design = design_of(made)
    for arm, entry in zip(arms_of(made), made["arms"], strict=True):
        extended = [GridPoint(point["rate"], point["alpha"]) for point in entry.get("curve", ())]
        for point in dict.fromkeys([*design.grid, *extended]):
            yield from ((arm, run) for run in (*design.choosing(arm.name, point), *design.final(arm.name, point)))


def _answer_tokens(folder: Path, split: Mapping[str, Any]) -> dict[str, list[int]]:
    """Count the answer tokens of the held-out rows of the split that the runs were judged on."""
    from llamafactory_adaptive.bridge.comparison_rows import COUNTS, HELD_OUT, answer_tokens

    for counts in (folder / "rows").glob(f"*/{COUNTS}"):
        if json.loads(counts.read_text(encoding="utf-8")) == split:
            halves = json.loads((counts.parent / HELD_OUT).read_text(encoding="utf-8"))
            return {half: answer_tokens(rows) for half, rows in halves.items()}
    raise SystemExit(f"the rows of the runs are no longer in {folder / 'rows'}")


def _slim(result: Mapping[str, Any], modules: Sequence[str]) -> Held:
    kept = {key: result[key] for key in KEPT if key in result}
    if "ranks" in result:
        kept["ranks"] = [result["ranks"].get(name, 0) for name in modules]
    return kept | {half: [round(loss, DECIMALS) for loss in result[half]] for half in HALVES if half in result}


def _whole(result: Mapping[str, Any], modules: Sequence[str]) -> Held:
    """Give ranks their names again; a module without an adapter has none."""
    ranks = {name: rank for name, rank in zip(modules, result.get("ranks", [0] * len(modules)), strict=True) if rank}
    return {**result, "ranks": ranks}
