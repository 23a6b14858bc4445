"""What planning before training costs: the start of a run over the host's own, and statistics of large models.

Run: ``python benchmarks/planning.py [--data FOLDER] [--samples 32] [--repeats 2] [--model FOLDER] [--only PART]``.

Start: seconds from the command to the beginning of training, SmolLM2-135M by default, each in a process of its own, in
turns, as ratios over plain LoRA of the same round: planned in the training process, in a process of its own, with the
plan re-used, and the command ``plan``. CPU seconds are those of all processes: a busy machine changes them less.

Large models: by the shapes of their modules alone. The measurement's own hooks and sums run on one token a batch, with
real tensors for all statistics; the weights are on the meta device. Bytes, host synchronisations per batch and Python
time per module (of the CPU) are measured so; what a forward pass of the real model takes is arithmetic.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import record


ROUND = ("host", "here", "own", "re-used", "plan")
GOAL_SECONDS = 3.0  # beyond the calibration pass
# Layers, hidden size, width of k and v, width of q, width of the MLP, experts a layer, parameters in billions, of them
# active for a token.
MODELS = {
    "Llama-3-8B": (32, 4096, 1024, 4096, 14336, 0, 8.0, 8.0),
    "Llama-3-70B": (80, 8192, 1024, 8192, 28672, 0, 70.6, 70.6),
    "Llama-3-405B": (126, 16384, 1024, 16384, 53248, 0, 405.9, 405.9),
    "128 experts x 48 layers": (48, 2048, 512, 4096, 768, 128, 30.5, 3.3),
}
MODULES_OF_LINEARITY = (5_000, 20_000, 50_000)
EXPERTS_OF_A_TOKEN = 8
PER_MODULE = "python_microseconds_per_module_and_batch"
TOKENS = 128 * 512  # of the default calibration, at most


# -- the start of a run ----------------------------------------------------------------------------------------------


def settings(kind: str, model: Path, folder: Path, dataset: str, samples: int, output: Path) -> dict[str, Any]:
    import torch

    template = "smollm2" if "SmolLM2" in str(model) else "default"
    plain = {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "dataset": dataset, "template": template,
        "dataset_dir": str(folder), "cutoff_len": 256, "max_steps": 1, "max_samples": 1000, "lora_target": "all",
        "per_device_train_batch_size": 1, "output_dir": str(output), "save_strategy": "no", "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(), "overwrite_output_dir": True, "lora_rank": 8,
    }  # fmt: skip
    if kind == "host":
        return {**plain, "finetuning_type": "lora"}
    process = "own" if kind == "own" else "auto"
    return {**plain, "finetuning_type": "adaptive", "adaptive_method": "sensitivity",
            "adaptive_calibration_samples": samples, "adaptive_calibration_process": process}  # fmt: skip


def start(args: dict[str, Any]) -> None:
    """One run up to the beginning of training."""
    from llamafactory_adaptive import _bootstrap

    _bootstrap.install()
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    class End(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            os._exit(0)

    run_exp(args, [End()])


def timed(command: list[str], cache: Path) -> dict[str, float]:
    """Seconds of a command, and CPU seconds of all its processes."""
    environment = {**os.environ, "LLAMAFACTORY_ADAPTIVE_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{command} failed:\n{said.read().decode()[-3000:]}")
    return {"seconds": time.perf_counter() - began, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def one_round(number: int, arguments: argparse.Namespace, model: Path, folder: Path, name: str, scratch: Path) -> dict:
    """Time every kind once; what is re-used is what the process before it left."""
    figures = {}
    for kind in ROUND:
        output = scratch / f"{number}-{kind.replace('-', '')}"
        cache = scratch / f"{number}-{'here' if kind == 're-used' else kind}-cache"
        args = settings(kind, model, folder, name, arguments.samples, output)
        config = output.with_suffix(".yaml")
        config.write_text(json.dumps(args))
        command = [sys.executable, __file__, "--begin", str(config)]
        if kind == "plan":
            command = [sys.executable, "-m", "llamafactory_adaptive.cli", "plan", str(config), "--out", str(output)]
        figures[kind] = timed(command, cache)
        plans = list((cache / "plans").glob("*.json")) if kind in ("here", "own") else []
        for plan in plans:
            figures[kind]["calibration_seconds"] = json.loads(plan.read_text())["provenance"]["calibration_seconds"]
        print(number, kind, {key: round(value, 2) for key, value in figures[kind].items()}, flush=True)
    return figures


def summary(rounds: list[dict]) -> dict[str, Any]:
    """Medians, ratios over the host of the same round, and what planning adds beyond its calibration pass."""
    result: dict[str, Any] = {}
    for kind in ROUND:
        result[kind] = {key: round(statistics.median(r[kind][key] for r in rounds), 2) for key in rounds[0][kind]}
        for unit in ("seconds", "cpu_seconds"):
            ratio = statistics.median(r[kind][unit] / r["host"][unit] for r in rounds)
            result[kind][f"{unit}_over_host"] = round(ratio, 3)
    for kind in ("here", "own"):
        added = (r[kind]["seconds"] - r["host"]["seconds"] - r[kind]["calibration_seconds"] for r in rounds)
        result[kind]["seconds_beyond_calibration"] = round(statistics.median(added), 2)
    return result


# -- statistics of large models ---------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A target module: its size, and the input that it shares with others."""

    name: str
    columns: int
    rows: int
    reads: str


def targets_of(layers: int, hidden: int, kv: int, q: int, wide: int, experts: int) -> Iterator[Target]:
    """Yield the target modules in the order in which a forward pass runs them."""
    for layer in range(layers):
        attention = f"model.layers.{layer}.self_attn."
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield Target(f"{attention}{name}", hidden, rows, attention)
        yield Target(f"{attention}o_proj", q, hidden, f"{attention}o_proj")
        for part in [f"experts.{number}." for number in range(experts)] or [""]:
            mlp = f"model.layers.{layer}.mlp.{part}"
            yield Target(f"{mlp}gate_proj", hidden, wide, mlp)
            yield Target(f"{mlp}up_proj", hidden, wide, mlp)
            yield Target(f"{mlp}down_proj", wide, hidden, f"{mlp}down_proj")


class Passed:
    """Counts the operations that make a host wait for its device."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        counted = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                counted.syncs += function._schema.name.split("::")[1] in counted.WAITING
                return function(*args, **(kwargs or {}))

        self.syncs, self.mode = 0, Mode()


def scored(targets: list[Target], batches: int = 3) -> dict[str, float]:
    """Run the measurement over modules that have shapes alone, one token a batch."""
    import torch
    from torch import nn

    from llamafactory_adaptive.calibration.batches import make_batches
    from llamafactory_adaptive.calibration.input_moments import InputSecondMoments

    class Shape(nn.Linear):
        """A linear module without weights; what it computes does not matter here."""

        def forward(self, x):
            return x

    with torch.device("meta"):
        modules = {target.name: Shape(target.columns, target.rows, bias=False) for target in targets}
    model = nn.ModuleList(modules.values())
    ones = {target.columns: torch.ones(1, 1, target.columns) for target in targets}
    seconds: list[float] = []
    rows = make_batches([{"input_ids": [1], "labels": [1]}] * batches, 1, 0)

    def forward(_, batch):
        began, reads, x = time.thread_time(), "", ones[targets[0].columns]
        for target in targets:
            if target.reads != reads:  # modules with one input share its reduction
                reads, x = target.reads, ones[target.columns].view(1, 1, -1)
            modules[target.name](x)
        seconds.append(time.thread_time() - began)

    bare = time.thread_time()
    forward(model, None)
    bare = time.thread_time() - bare
    seconds.clear()
    statistics_of_modules = InputSecondMoments()(model, modules, rows, forward)
    return {
        "bytes": sum(tensor.nbytes for tensor in statistics_of_modules.values()),
        "seconds_per_batch": statistics.median(seconds[1:]) - bare,
    }


def syncs_per_batch(targets: list[Target]) -> float:
    """Host synchronisations that one more batch brings."""
    counts = []
    for batches in (1, 3):
        counter = Passed()
        with counter.mode:
            scored(targets[:200], batches + 1)
        counts.append(counter.syncs)
    return (counts[1] - counts[0]) / 2


def large_models() -> dict[str, Any]:
    result = {}
    for name, (*shape, billions, active) in MODELS.items():
        targets = list(targets_of(*shape))
        found = scored(targets)
        weights = sum(target.columns * target.rows for target in targets)
        shares = {target.reads: target.columns * (EXPERTS_OF_A_TOKEN / 128 if ".experts." in target.name else 1)
                  for target in targets}  # fmt: skip
        result[name] = {
            "modules": len(targets),
            "statistics_megabytes": round(found["bytes"] / 1e6, 1),
            "syncs_per_batch": syncs_per_batch(targets),
            PER_MODULE: round(found["seconds_per_batch"] / len(targets) * 1e6, 1),
            "arithmetic": {
                "base_gigabytes_bf16": round(2 * billions, 1),
                "base_gigabytes_4bit": round(0.56 * billions, 1),  # 4 bits and scales; embeddings are not quantised
                "gora_ranks_gigabytes_of_host_memory": round(4 * weights / 1e9, 1),
                # 8 rows of 512 tokens in bf16
                "gigabytes_of_inputs_held_by_a_backward_pass": round(sum(shares.values()) * 8 * 512 * 2 / 1e9, 1),
                "forward_petaflop_of_128_samples_of_512": round(2 * active * TOKENS / 1e6, 2),
                "seconds_at_400_teraflop": round(2 * active * TOKENS / 1e6 / 0.4, 1),
            },
        }
        print(name, result[name], flush=True)
    return result


def linearity() -> dict[str, float]:
    """Python time per module and batch as modules grow in number."""
    figures = {}
    for count in MODULES_OF_LINEARITY:
        targets = [Target(f"m{number}", 1024, 1024, f"m{number}") for number in range(count)]
        figures[str(count)] = round(scored(targets)["seconds_per_batch"] / count * 1e6, 1)
    print("microseconds per module and batch", figures, flush=True)
    return figures


def begun(arguments: argparse.Namespace) -> dict[str, Any]:
    model = arguments.model or record.smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = record.dataset_folder(arguments.data, Path(scratch) / "data")
        rounds = [one_round(n, arguments, model, folder, name, Path(scratch)) for n in range(arguments.repeats)]
    result = summary(rounds)
    added = result["here"]["seconds_beyond_calibration"]
    print(
        f"beyond the calibration pass {added} s, goal {GOAL_SECONDS}: {'met' if added <= GOAL_SECONDS else 'MISSED'}"
    )
    return {"model": model.name, "data": name, "samples": arguments.samples, "repeats": arguments.repeats,
            "goal_seconds_beyond_calibration": GOAL_SECONDS, **result, "rounds": rounds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--model", type=Path, help="a folder with a model (default: SmolLM2-135M)")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=("start", "large"), help="one part; the other stays as it is recorded")
    parser.add_argument("--begin", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begin:
        return start(json.loads(arguments.begin.read_text()))
    recorded = record.RESULTS / "planning.json"
    parts = json.loads(recorded.read_text()) if arguments.only and recorded.exists() else {}
    parts = {name: parts[name] for name in ("start", "large_models", PER_MODULE) if name in parts}
    if arguments.only != "start":
        parts |= {"large_models": large_models(), PER_MODULE: linearity()}
    if arguments.only != "large":
        parts["start"] = begun(arguments)
    print(f"written to {record.write_result('planning', parts)}")


if __name__ == "__main__":
    main()
