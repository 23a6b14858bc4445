"""Did it pay: every method against plain LoRA of the same budget, by loss on held-out rows, over several seeds.

Run: ``python benchmarks/worth_it.py [--data FOLDER] [--seeds 3] [--steps 300] [--rates 2e-4,5e-4,1e-3] [--methods ...]
[--keep FOLDER]``.

Every run is the command a user types: one model (SmolLM2-135M), one data set, one number of optimizer steps, one
budget of what is saved (while ranks are sought, ``igu`` and ``adalora`` train tensors of twice that rank, ``tsq`` of
four times).
Stock ``finetuning_type: lora`` is the rival, ``random`` the control. Each method takes the learning rate at which it
does best on one half of the held-out rows; what is reported is the other half, which chose nothing. Differences are
taken seed by seed, with 95 % intervals and p values of Student's t, the latter corrected for the number of methods
(Holm). They speak of these rows: seeds vary, rows do not. Time is that of the whole command, planning and scoring
included. For methods that move ranks about: what moved at each allocation. ``igu`` and ``adalora`` need some hundreds
of steps (docs/footguns.md).
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch
import yaml
from scipy import stats


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora"},
    "uniform": {"adaptive_method": "uniform"},
    "random": {"adaptive_method": "random"},
    "sensitivity": {"adaptive_method": "sensitivity"},
    "adalora": {"adaptive_method": "adalora"},
    "igu": {"adaptive_method": "igu"},
    "tsq": {"adaptive_method": "tsq"},
    "tsq, ranks alone": {"adaptive_method": "tsq", "tsq_sampling": False},
    "tsq, samples alone": {"adaptive_method": "tsq", "tsq_reallocation": False},
}
MOVED = ("step", "grown", "shrunk", "budget_asked", "budget_used")


def prepare(data: str | None, folder: Path, train: int, held_out: int) -> str:
    """Training rows, and the held-out rows in two halves; returns where they come from."""
    source, name = record.dataset_folder(data, folder / "source")
    lines, pair = record.read_lines(source, name)
    lines = list(dict.fromkeys(lines))
    rows = [pair(line) for line in random.Random(0).sample(lines, min(len(lines), train + 2 * held_out))]
    parts = {"dev": rows[:held_out], "test": rows[held_out : 2 * held_out], "train": rows[2 * held_out :]}
    if len(parts["train"]) < held_out:
        raise SystemExit(f"{name} has {len(rows)} rows, too few for 2 x {held_out} held-out ones; lower --held-out")
    for part, chosen in parts.items():
        texts = [{"instruction": question, "input": "", "output": answer} for question, answer in chosen]
        (folder / f"{part}.json").write_text(json.dumps(texts), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({part: {"file_name": f"{part}.json"} for part in parts}))
    return name


def settings(options: argparse.Namespace, folder: Path, method: str, seed: int, rate: float) -> dict[str, Any]:
    return {
        "model_name_or_path": str(record.smollm2()), "stage": "sft", "do_train": True, "do_eval": True,
        "finetuning_type": "adaptive", "lora_rank": options.rank, "lora_target": "all", "dataset": "train",
        "eval_dataset": "dev,test", "eval_on_each_dataset": True, "dataset_dir": str(folder), "template": "smollm2",
        "cutoff_len": 512, "max_steps": options.steps, "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size, "learning_rate": rate, "lr_scheduler_type": "linear",
        "warmup_steps": 0.1, "logging_steps": 10, "save_strategy": "no", "report_to": "none", "bf16": True,
        "use_cpu": not torch.accelerator.is_available(), "seed": seed, "overwrite_output_dir": True,
        **METHODS[method],
    }  # fmt: skip


def train(args: dict[str, Any], output: Path) -> dict[str, Any]:
    """One run in a process of its own; what came of it. One that lies there already is not run again."""
    result_file = output / "worth_it.json"
    if result_file.exists() and (kept := json.loads(result_file.read_text()))["settings"] == args:
        return kept["run"]
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**args, "output_dir": str(output)}))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                   "LLAMAFACTORY_ADAPTIVE_CACHE": str(output / "cache")}  # fmt: skip
    started = time.perf_counter()
    with open(output.with_suffix(".log"), "wb") as log:
        done = subprocess.run(["llamafactory-cli", "train", str(path)], env=environment, stdout=log, stderr=log,
                              check=False)  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode:
        words = output.with_suffix(".log").read_text(errors="replace").splitlines()
        return {"dev": math.inf, "test": math.inf, "seconds": seconds, "parameters": 0, "failed": words[-1:]}
    run = outcome(output, seconds)
    result_file.write_text(json.dumps({"settings": args, "run": run}))
    return run


def outcome(output: Path, seconds: float) -> dict[str, Any]:
    results = json.loads((output / "all_results.json").read_text())
    log = output / "adaptive_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    moved = [{key: line[key] for key in MOVED} for line in lines if "grown" in line]
    dev, test = (loss if math.isfinite(loss := results[f"eval_{part}_loss"]) else math.inf for part in ("dev", "test"))
    return {"dev": dev, "test": test, "seconds": seconds, "parameters": trained_parameters(output),
            **({"allocations": moved} if moved else {})}  # fmt: skip


def trained_parameters(adapter: Path) -> int:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        return sum(int(torch.tensor(file.get_slice(key).get_shape()).prod()) for key in file.keys())  # noqa: SIM118


def paired(first: list[float], second: list[float]) -> dict[str, float]:
    """Second minus first, seed by seed: mean, 95 % interval, p value; the mean alone where there is one seed."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    difference = {"mean": sum(differences) / len(differences)}
    if len(differences) > 1 and any(differences):
        test = stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        difference |= {"low": float(low), "high": float(high), "p": float(test.pvalue)}
    return difference


def summary(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """Per method: the learning rate that its dev halves chose, and the test halves at it against the rivals'."""
    rows: dict[str, dict[str, Any]] = {}
    for method, by_rate in runs.items():
        rate = min(by_rate, key=lambda rate: sum(run["dev"] for run in by_rate[rate]))
        chosen = by_rate[rate]
        losses = [run["test"] for run in chosen]
        rows[method] = {
            "rate": float(rate), "loss": sum(losses) / len(losses), "losses": losses,
            "rate_at_the_edge": len(by_rate) > 1 and float(rate) in {f(map(float, by_rate)) for f in (min, max)},
            "parameters": max(run["parameters"] for run in chosen),
            "seconds": sum(run["seconds"] for run in chosen) / len(chosen),
        }  # fmt: skip
    for rival in ("lora", "random"):
        if rival not in rows:
            continue
        others = [name for name in rows if name not in ("lora", rival)]
        for name in others:
            rows[name][f"over_{rival}"] = paired(rows[rival]["losses"], rows[name]["losses"])
        holm([rows[name][f"over_{rival}"] for name in others])
    for row in rows.values():
        row["time_ratio"] = row["seconds"] / rows["lora"]["seconds"]
    return rows


def holm(differences: list[dict[str, float]]) -> None:
    """Add ``p_holm``: p values corrected for their number (Holm 1979)."""
    tested = sorted((each for each in differences if "p" in each), key=lambda each: each["p"])
    largest = 0.0
    for place, difference in enumerate(tested):
        largest = difference["p_holm"] = min(1.0, max(largest, difference["p"] * (len(tested) - place)))


def verdict(difference: dict[str, float]) -> str:
    if "p_holm" not in difference:
        return "no difference" if difference["mean"] == 0.0 else "one seed: nothing can be said"
    if difference["p_holm"] >= 0.05:
        return "no difference shown"
    return "better on these rows" if difference["mean"] < 0.0 else "worse on these rows"


def told(row: dict[str, Any]) -> str:
    words = [f"rate {row['rate']:<7g}loss {row['loss']:.4f}  time {row['time_ratio']:.2f} x  {row['parameters']:,} "
             "parameters"]  # fmt: skip
    for rival in ("lora", "random"):
        if (over := row.get(f"over_{rival}")) is not None:
            reach = f" ({over['low']:+.4f} to {over['high']:+.4f})" if "low" in over else ""
            words.append(f"over {rival} {over['mean']:+.4f}{reach}: {verdict(over)}")
    return "  ".join(words) + ("  (its best rate is the end of the list)" if row["rate_at_the_edge"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--methods", default=",".join(METHODS).replace(", ", "+"), help="comma separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="2e-4,5e-4,1e-3", help="learning rates to choose from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train", type=int, default=1200, help="training rows")
    parser.add_argument("--held-out", type=int, default=72, help="rows that choose the rate, and as many that judge")
    parser.add_argument(
        "--keep",
        type=Path,
        help="folder for the outputs of all runs; what lies there is not run again (default: thrown away)",
    )
    options = parser.parse_args()
    methods = [name.replace("+", ", ") for name in options.methods.split(",")]
    if unknown := [name for name in methods if name not in METHODS]:
        raise SystemExit(f"--methods: {', '.join(unknown)} is none of {', '.join(METHODS)}")
    methods = ["lora", *(name for name in methods if name != "lora")]
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in methods}
    with tempfile.TemporaryDirectory() as name:
        scratch = options.keep or Path(name)
        (scratch / "data").mkdir(parents=True, exist_ok=True)
        dataset = prepare(options.data, scratch / "data", options.train, options.held_out)
        for rate in options.rates.split(","):
            for seed in range(options.seeds):  # methods take turns, so that a drifting machine treats them alike
                for method in methods:
                    output = scratch / f"{method.replace(', ', '_').replace(' ', '_')}-{rate}-{seed}"
                    run = train(settings(options, scratch / "data", method, seed, float(rate)), output)
                    runs[method].setdefault(rate, []).append(run)
                    print(f"{method:<18} rate {rate:<6} seed {seed}  loss {run['test']:.4f}  {run['seconds']:.0f} s",
                          flush=True)  # fmt: skip
    rows = summary(runs)
    for method, row in rows.items():
        print(f"{method:<18} {told(row)}")
    written = record.write_result("worth_it", {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "data": dataset, "rank": options.rank,
        "steps": options.steps, "batch_size": options.batch_size, "held_out": options.held_out, "seeds": options.seeds,
        "device": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu",
        "results": {method: {**row, **({"verdict": verdict(row["over_lora"])} if "over_lora" in row else {})}
                    for method, row in rows.items()}, "runs": runs,
    })  # fmt: skip
    print(f"written to {written}")


if __name__ == "__main__":
    main()
