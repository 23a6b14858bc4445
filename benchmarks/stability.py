"""How much of an allocation is chance: ranks of one method between engines, seeds and halves of the data.

Run: ``python benchmarks/stability.py [--data FOLDER] [--steps 40] [--methods ...] [--engines DDP,ZeRO-2,ZeRO-3]
[--keep FOLDER]``.

SmolLM2-135M with its bf16 base, one global batch of 4 x 64 tokens a step, every run the command a user types. Per
method a first run in one process with seed 42 on the first half of the rows is compared with runs that differ in one
thing: another engine on two processes (the same batches: what differs is rounding), another seed, the other half of
the rows. Told are the shares of modules at the same rank and within one of it,
and Spearman's correlation of the ranks; ``random`` shows what chance gives. A method whose ranks rounding decides has
measured noise.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import engines
import record
from scipy import stats


PRUNING = {"adaptive_interval": 4, "adaptive_warmup_ratio": 0.5, "adaptive_final_ratio": 0.2}
METHODS: dict[str, dict[str, Any]] = {
    "corrected": {"adaptive_method": "igu", **PRUNING},
    "product": {"adaptive_method": "igu", "igu_uncertainty": "product", **PRUNING},
    "published": {"adaptive_method": "igu", "igu_variant": "published", **PRUNING},
    "adalora": {"adaptive_method": "adalora", **PRUNING},
    "tsq, ranks alone": {"adaptive_method": "tsq", "tsq_sampling": False},
    "sensitivity": {"adaptive_method": "sensitivity", "adaptive_calibration_samples": 64},
    "random": {"adaptive_method": "random"},
}
ENGINES = {"DDP": None, "ZeRO-2": engines.ZERO2, "ZeRO-3": engines.ZERO3}
FIXED = ("sensitivity", "random")  # scored in one process, whatever engine trains


def halves(data: str | None, folder: Path) -> None:
    """Write the rows of a data set as two data sets."""
    source, name = record.dataset_folder(data, folder / "source")
    lines, pair = record.read_lines(source, name)
    for half in (0, 1):
        rows = [{"instruction": question, "input": "", "output": answer}
                for question, answer in map(pair, lines[half::2])]  # fmt: skip
        (folder / f"half{half}.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {f"half{half}": {"file_name": f"half{half}.json"} for half in (0, 1)}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def settings(folder: Path, method: str, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build the settings of a method's first run."""
    plain = engines.settings(record.smollm2(), folder, "half0", output, options)
    kept = {key: value for key, value in plain.items() if key not in ("adaptive_method", "adaptive_interval")}
    return {**kept, "save_strategy": "no", "learning_rate": options.rate, **METHODS[method]}


def ranks(args: dict[str, Any], processes: int, scratch: Path) -> list[int]:
    """Run once, unless an earlier call with these settings has, and return the ranks in model order."""
    output = Path(args["output_dir"])
    kept = output.with_suffix(".json")
    if kept.is_file() and (held := json.loads(kept.read_text()))["settings"] == args:
        return held["ranks"]
    engines.launch({**args, "overwrite_output_dir": True}, processes, scratch)
    ranks_by_module, _ = engines.outcome(output)
    kept.write_text(json.dumps({"settings": args, "ranks": ranks_by_module}))
    return ranks_by_module


def agreement(first: list[int], second: list[int]) -> dict[str, float | None]:
    """Compare two allocations: modules at the same rank, or within one of it, and Spearman's correlation."""
    steps = [abs(a - b) for a, b in zip(first, second, strict=True)]
    same, near = (sum(step <= reach for step in steps) / len(steps) for reach in (0, 1))
    vary = len(set(first)) > 1 and len(set(second)) > 1
    correlation = float(stats.spearmanr(first, second).statistic) if vary else None
    return {"same_rank": same, "within_one": near, "correlation": correlation}


def words(row: dict[str, float | None]) -> str:
    """Describe an agreement; where all ranks are equal there is no correlation."""
    correlation = "-" if row["correlation"] is None else f"{row['correlation']:.3f}"
    same, near = row["same_rank"], row["within_one"]
    return f"{same:.1%} at the same rank, {near:.1%} within one, correlation {correlation}"


def compare(method: str, scratch: Path, options: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Run a method once as it is, and once with each thing changed."""
    rows: dict[str, dict[str, float | None]] = {}

    def run(change: str, processes: int = 1, **more: Any) -> list[int]:
        output = scratch / f"{method} {change}".replace(", ", "_").replace(" ", "_")
        allocation = ranks({**settings(scratch, method, output, options), **more}, processes, scratch)
        if change != "first":
            rows[change] = agreement(first, allocation)
            print(f"{method:<18} {change:<12} {words(rows[change])}", flush=True)
        return allocation

    first = run("first")
    for engine in options.engines.split(",") if method not in FIXED else ():
        run(engine, 2, **({"deepspeed": str(ENGINES[engine])} if ENGINES[engine] else {}))
    run("seed", seed=43)
    run("other data", dataset="half1")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated rows)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of every method")
    parser.add_argument("--methods", default=";".join(METHODS), help="semicolon separated")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma separated")
    parser.add_argument("--keep", type=Path, help="folder of finished runs, which are not made again")
    options = parser.parse_args()
    options.bf16 = True
    with tempfile.TemporaryDirectory() as name:
        scratch = (options.keep or Path(name)).resolve()
        scratch.mkdir(parents=True, exist_ok=True)
        halves(options.data, scratch)
        results = {method: compare(method, scratch, options) for method in options.methods.split(";")}
    path = record.write_result("stability", {
        "model": "SmolLM2-135M-Instruct", "precision": "bf16", "global_batch": "4 x 64 tokens", "steps": options.steps,
        "learning_rate": options.rate, "methods": {method: METHODS[method] for method in results},
        "agreement_with_first_run": results,
    })  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
