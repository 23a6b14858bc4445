"""What pruning costs while it trains: SmolLM2-135M, batch 4 x 256, all targets, everything as ratios within one run.

Run: ``python benchmarks/overhead.py [--data FOLDER] [--steps 40] [--only NAME,...]``.

Every variant is a real LLaMA-Factory run in a process of its own. All are alive at once and take turns, one optimizer
step each, so that a machine whose speed drifts treats them alike. The baseline is plain LoRA of the rank that the
others are over-ranked to. A second baseline run shows the noise. Step time includes allocations; the first two steps
are dropped. Memory is the peak of the whole process (of the device, where there is one).
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record


RANK = 8
TARGETS = {"igu": 1.05, "adalora": 1.05, "tsq ranks alone": 1.05, "memory": 1.03}
PRUNING = {"finetuning_type": "adaptive", "lora_rank": RANK, "lora_alpha": 2 * RANK}
PLAIN = {"finetuning_type": "lora", "lora_rank": 2 * RANK, "lora_alpha": 4 * RANK}
VARIANTS: dict[str, dict[str, Any]] = {
    "uniform": PLAIN,
    "uniform again": PLAIN,
    "igu": {**PRUNING, "adaptive_method": "igu"},
    "adalora": {**PRUNING, "adaptive_method": "adalora"},
    "igu integrated": {**PRUNING, "adaptive_method": "igu", "igu_importance": "integrated"},
    "igu integrated at most 20 %": {**PRUNING, "adaptive_method": "igu", "igu_importance": "integrated",
                                     "adaptive_max_overhead": 0.2},
    # as many components in use as the others train, at the budget's end as well
    "tsq ranks alone": {**PRUNING, "adaptive_method": "tsq", "tsq_sampling": False, "adaptive_max_rank": 2 * RANK},
    "peft adalora": {**PLAIN, "peft_adalora": True},
}  # fmt: skip


def settings(variant: str, model: Path, folder: Path, dataset: str, steps: int, output: Path) -> dict[str, Any]:
    """Packed rows of exactly 256 tokens, the same for every variant."""
    import torch

    accelerated = torch.accelerator.is_available()
    return {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "dataset": dataset,
        "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 256, "packing": True, "max_steps": steps,
        "per_device_train_batch_size": 4, "learning_rate": 1e-4, "lora_target": "all", "output_dir": str(output),
        "save_strategy": "no", "report_to": "none", "logging_steps": 10, "bf16": True, "use_cpu": not accelerated,
        "overwrite_output_dir": True, "disable_tqdm": True, "seed": 42, **VARIANTS[variant],
    }  # fmt: skip


def child(args: dict[str, Any]) -> None:
    """One run; each line on standard input lets it take one step, each step's seconds go to standard output."""
    import torch
    from transformers import TrainerCallback

    from llamafactory_adaptive import _bootstrap
    from llamafactory_adaptive.accelerator import peak_memory

    _bootstrap.install()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the host prints a lot

    def wait() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    class Turn(TrainerCallback):
        """Waits between steps, where the plugin measures no training time."""

        def on_train_begin(self, *args, **kwargs):
            sys.stdin.readline()
            wait()
            self.started = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            wait()
            print(time.perf_counter() - self.started, file=answers)
            self.on_train_begin()

    class Allocate(TrainerCallback):
        """What PEFT's documentation asks of AdaLoRA's user: after the optimizer step, before gradients are cleared."""

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            model.base_model.update_and_allocate(state.global_step + 1)

    callbacks: list[TrainerCallback] = [Turn()]
    if args.pop("peft_adalora", False):
        import peft
        from llamafactory.model import adapter

        steps = args["max_steps"]

        def adalora(**given: Any) -> Any:
            kept = {k: v for k, v in given.items() if k not in ("r", "use_rslora", "use_dora", "pissa_init")}
            return peft.AdaLoraConfig(init_r=2 * RANK, target_r=RANK, tinit=int(0.1 * steps), tfinal=int(0.3 * steps),
                                      deltaT=10, total_step=steps, **kept)  # fmt: skip

        adapter.LoraConfig = adalora
        callbacks.append(Allocate())
    from llamafactory.train.tuner import run_exp

    run_exp(args, callbacks)
    peak = peak_memory()
    print(json.dumps({"peak_bytes": peak.get("device", peak["host"])}), file=answers)


def take_turns(runs: dict[str, dict[str, Any]], steps: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every step and peak bytes, by variant."""
    processes = {
        name: subprocess.Popen([sys.executable, __file__, "--child", json.dumps(args)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for name, args in runs.items()
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    try:
        for step in range(steps):
            shuffle.shuffle(order)
            for name in order:
                process = processes[name]
                process.stdin.write("\n")
                process.stdin.flush()
                line = process.stdout.readline()
                if not line:
                    raise SystemExit(f"{name} ended early with exit code {process.wait()}")
                seconds[name].append(float(line))
            print(f"step {step + 1}/{steps}", end="\r", file=sys.stderr, flush=True)
        for process in processes.values():
            process.stdin.close()
        peaks = {name: json.loads(process.stdout.readline())["peak_bytes"] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return seconds, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated rows)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", help="names of variants, comma separated; uniform always runs")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    only = options.only.split(",") if options.only else list(VARIANTS)
    with tempfile.TemporaryDirectory() as scratch:
        folder, dataset = record.dataset_folder(options.data, Path(scratch) / "data")
        model = record.smollm2()
        runs = {
            name: settings(name, model, folder, dataset, options.steps, Path(scratch) / name.replace(" ", "_"))
            for name in VARIANTS
            if name == "uniform" or name in only
        }
        seconds, peaks = take_turns(runs, options.steps)
    final = options.steps - round(0.3 * options.steps)  # from here on nothing is scored
    rows = {}
    for name, values in seconds.items():
        base = seconds["uniform"]
        pairs = [mine / theirs for mine, theirs in zip(values[2:final], base[2:final], strict=True)]
        rows[name] = {
            "seconds_per_step": statistics.mean(values[2:final]),
            "time_ratio": sum(values[2:final]) / sum(base[2:final]),
            "median_step_ratio": statistics.median(pairs),
            "final_phase_time_ratio": sum(values[final:]) / sum(base[final:]),
            "memory_ratio": peaks[name] / peaks["uniform"],
        }
        row = rows[name]
        print(f"{name:<30} {row['seconds_per_step']:.3f} s/step, x{row['time_ratio']:.3f} of uniform (median of pairs "
              f"{row['median_step_ratio']:.3f}; final phase x{row['final_phase_time_ratio']:.3f}), memory "
              f"x{row['memory_ratio']:.3f}")  # fmt: skip
    path = record.write_result("overhead", {
        "model": "SmolLM2-135M-Instruct", "batch": "4 x 256 tokens", "live_rank": 2 * RANK, "dataset": dataset,
        "steps": options.steps, "device": device(), "targets": TARGETS, "variants": rows,
        "seconds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    })  # fmt: skip
    print(f"written to {path}")


def device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


if __name__ == "__main__":
    main()
