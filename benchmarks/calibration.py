"""What scoring costs, and how few samples it needs: SmolLM2-135M, everything as ratios within one run.

Run: ``python benchmarks/calibration.py [--data FOLDER] [--samples 128] [--repeats 7]``.

Three figures against targets:
  time    one scoring pass / one bare forward pass (``model(...)``) of the same batches. Scoring skips the output head,
          whose logits nobody reads; the ratio over a forward pass that skips it too is printed as a detail.
  memory  peak resident memory of a process that scores / of one that only runs the forward pass
  tau     Kendall's tau between the scores of 10 % of the set and of all of it
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
import torch
from scipy.stats import kendalltau
from transformers import AutoModelForCausalLM

from llamafactory_adaptive.accelerator import peak_memory
from llamafactory_adaptive.calibration.batches import Batch, count_tokens, make_batches
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.methods import ScoringContext
from llamafactory_adaptive.methods.sensitivity import Sensitivity, SensitivityOptions
from llamafactory_adaptive.ranks.plan import ModuleShape


DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
TARGETS = {"time_ratio": 1.10, "memory_ratio": 1.05, "tau": 0.98}


def load(model: Path) -> tuple[torch.nn.Module, dict[str, torch.nn.Module]]:
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval().to(DEVICE)
    named = dict(loaded.named_modules())
    return loaded, {n: m for n, m in named.items() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def forward(model: torch.nn.Module, batches: list[Batch], head: bool) -> None:
    body = model if head else model.base_model
    with torch.no_grad():
        for batch in batches:
            body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def batches_of(rows, batch_size: int) -> list[Batch]:
    return [batch.to(DEVICE) for batch in make_batches(rows, batch_size, 0)]


def timed(action) -> float:
    started = time.perf_counter()
    action()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def time_ratios(model, modules, batches, repeats: int) -> dict[str, float]:
    """Alternating runs; the median of the pairwise ratios survives a machine whose speed drifts."""
    kinds = {
        "scoring": lambda: InputSecondMoments()(model, modules, batches),
        "forward": lambda: forward(model, batches, head=True),
        "forward_without_head": lambda: forward(model, batches, head=False),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(repeats + 1):
        for kind, action in kinds.items():
            elapsed = timed(action)
            if turn:  # the first round warms up
                seconds[kind].append(elapsed)
    pairs = {
        f"scoring_over_{kind}": [a / b for a, b in zip(seconds["scoring"], seconds[kind], strict=True)]
        for kind in ("forward", "forward_without_head")
    }
    return {
        **{f"median_seconds_{kind}": round(statistics.median(values), 3) for kind, values in seconds.items()},
        **{name: round(statistics.median(values), 4) for name, values in pairs.items()},
        **{f"{name}_range": [round(min(values), 4), round(max(values), 4)] for name, values in pairs.items()},
    }


def theta(model, modules, rows, batch_size: int) -> list[float]:
    method = Sensitivity(SensitivityOptions(transform="none"))  # the formula whose tau the paper gives
    moments = method.measurement()(model, modules, batches_of(rows, batch_size))
    shapes = tuple(ModuleShape(n, m.in_features, m.out_features) for n, m in modules.items())
    return list(method.score(moments, ScoringContext(shapes, 8, 0)).values.values())


def peak_megabytes(kind: str, arguments: argparse.Namespace) -> float:
    """Peak memory of a fresh process that loads the model and does one kind of pass: resident, or of the GPU."""
    command = [sys.executable, __file__, "--peak", kind, "--samples", str(arguments.samples)]
    if arguments.data:
        command += ["--data", arguments.data]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(output.strip().splitlines()[-1])


def one_pass(kind: str, arguments: argparse.Namespace, folder: Path, name: str, model_path: Path) -> None:
    rows = record.read_rows(folder, name, model_path, arguments.samples)
    model, modules = load(model_path)
    batches = batches_of(rows, arguments.batch_size)
    if kind == "scoring":
        InputSecondMoments()(model, modules, batches)
    else:
        forward(model, batches, head=kind == "forward")
    print(peak_memory()["device" if DEVICE.type == "cuda" else "host"] / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak", choices=("scoring", "forward", "forward_without_head"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model_path = record.smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = record.dataset_folder(arguments.data, Path(scratch))
        if arguments.peak:
            return one_pass(arguments.peak, arguments, folder, name, model_path)
        rows = record.read_rows(folder, name, model_path, arguments.samples)
    peaks = {kind: peak_megabytes(kind, arguments) for kind in ("forward", "forward_without_head", "scoring")}
    model, modules = load(model_path)
    batches = batches_of(rows, arguments.batch_size)
    figures = time_ratios(model, modules, batches, arguments.repeats)
    whole = theta(model, modules, rows, arguments.batch_size)
    tenth = theta(model, modules, rows[: max(1, len(rows) // 10)], arguments.batch_size)
    results = {
        "time_ratio": figures["scoring_over_forward"],
        "time_ratio_without_head": figures["scoring_over_forward_without_head"],
        "memory_ratio": round(peaks["scoring"] / peaks["forward"], 4),
        "memory_ratio_without_head": round(peaks["scoring"] / peaks["forward_without_head"], 4),
        "tau": round(float(kendalltau(tenth, whole).statistic), 4),
    }
    for key, target in TARGETS.items():
        good = results[key] >= target if key == "tau" else results[key] <= target
        print(f"{key:<14} {results[key]:<8} target {target:<6} {'met' if good else 'MISSED'}")
    for key, value in figures.items():
        print(f"  {key:<34} {value}")
    path = record.write_result("calibration", {
        "device": DEVICE.type, "data": name, "samples": len(rows), "tokens": count_tokens(batches),
        "modules": len(modules), "results": results, "targets": TARGETS, "details": figures, "peak_megabytes": peaks,
    })  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
