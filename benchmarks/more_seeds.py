"""Further seeds of plain LoRA and the default, beyond those that ``method_quality.py --model smollm2`` has recorded.

Run: ``python benchmarks/more_seeds.py 30 [--data FOLDER] [--processes 2]``. Each arm stays at the rate that is
recorded for it, which no judging row has chosen. The record is written anew whenever both arms have another seed; the
same command goes on where it was ended. Figures of ranks stay those of the seeds that they were recorded for.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import record
import torch
from method_arms import ARMS
from method_quality import Run, train
from method_tasks import SmolLM2Task
from paired_seeds import tell_differences


NAME = "method_quality_smollm2"
CONTINUED = ("lora", "corrected")
Rows = dict[str, dict[str, Any]]


def judged(run: Run, data: str | None, folder: Path) -> tuple[Run, float]:
    """Make a run, in a process of its own, and return its loss on the rows that judge."""
    torch.set_num_threads(1)
    return run, float(train(SmolLM2Task(folder, data), run)["test"])


def missing(recorded: dict[str, Any], rows: Rows, rank: int, seeds: int) -> list[Run]:
    """List the runs that are not recorded, seed by seed."""
    runs = []
    for seed in range(seeds):
        for arm in CONTINUED:
            if seed >= len(rows[arm]["losses"]):
                options = json.dumps(ARMS[arm][1], sort_keys=True)
                runs.append(Run(arm, ARMS[arm][0], options, rank, rows[arm]["rate"], seed, recorded["steps"]))
    return runs


def write(recorded: dict[str, Any], rows: Rows, found: dict[str, dict[int, float]]) -> None:
    """Write the record anew, with the seeds that all continued arms have by now."""
    old = {arm: rows[arm]["losses"] for arm in CONTINUED}
    losses = {arm: [*old[arm], *(loss for _, loss in sorted(found[arm].items()))] for arm in CONTINUED}
    seeds = min(_without_gaps(len(old[arm]), found[arm]) for arm in CONTINUED)
    if seeds <= min(map(len, old.values())):
        return
    for arm in CONTINUED:
        rows[arm]["losses"] = losses[arm][:seeds]
        rows[arm]["loss"] = statistics.fmean(rows[arm]["losses"])
        found[arm] = {seed: loss for seed, loss in found[arm].items() if seed >= seeds}
    tell_differences(rows)
    recorded["seeds_of_default"] = seeds
    facts = ("benchmark", "command", "date", "machine", "python", "versions")
    figures = {key: value for key, value in recorded.items() if key not in facts}
    record.write_result(NAME, figures | {"recorded_by": recorded.get("recorded_by", recorded["command"])})


def _without_gaps(first: int, found: dict[int, float]) -> int:
    """Count the seeds from 0 on of which none is missing."""
    while first in found:
        first += 1
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seeds", type=int, help="seeds that both arms are to have")
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--processes", type=int, default=2, help="runs at once, each with one thread")
    options = parser.parse_args()
    recorded = json.loads((record.RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
    (rank, rows), found = next(iter(recorded["results_by_rank"].items())), {arm: {} for arm in CONTINUED}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(options.processes, context) as pool:
        todo = missing(recorded, rows, int(rank), options.seeds)
        folders = [Path(scratch) / str(index) for index in range(len(todo))]
        jobs = [pool.submit(judged, run, options.data, folder) for run, folder in zip(todo, folders, strict=True)]
        for done in as_completed(jobs):
            run, loss = done.result()
            found[run.arm][run.seed] = loss
            write(recorded, rows, found)
            print(f"{run.arm:<12} seed {run.seed}  loss {loss:.4f}", flush=True)
    over = rows["corrected"]["over_lora"]
    print(f"over plain LoRA {over['mean']:+.4f} ({over['low']:+.4f} to {over['high']:+.4f}), equivalent: "
          f"{over['equivalent']}")  # fmt: skip


if __name__ == "__main__":
    main()
