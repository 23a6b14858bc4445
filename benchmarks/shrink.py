"""Time and peak memory of cutting an adapter of Llama-3-8B's shapes, rank 64, to a quarter.

Run: ``python benchmarks/shrink.py [--layers 32] [--rank 64] [--threads 2]``.

Random factors on all seven linear layers of each block (fp32, as LLaMA-Factory saves them), whose singular values fall
off, so that modules end with different ranks. ``llamafactory-adaptive shrink --rank RANK/4`` then runs in a process of
its own, with the check of every module that it always makes. Its time and peak memory are told less those of a process
that only imports the same packages. Targets: minutes on a CPU, and memory that does not grow with the layers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record


SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}  # fmt: skip
# Prints the process's own peak memory in KiB: what the system keeps for a finished child begins with its parent's.
PEAK = """
import sys
from pathlib import Path
from llamafactory_adaptive import cli
if len(sys.argv) > 1:
    code = cli.main(sys.argv[1:])
else:
    from llamafactory_adaptive.export.shrink import shrinker
    code = 0
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])
sys.exit(code)
"""


def write_adapter(folder: Path, layers: int, rank: int) -> int:
    """Write random factors, one tensor at a time; return the number of parameters."""
    import torch

    from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS, contract_arguments
    from llamafactory_adaptive.export.layouts import write_config
    from llamafactory_adaptive.export.safetensors_stream import TensorSpec, write_streaming
    from llamafactory_adaptive.export.source_adapter import factor_key

    torch.manual_seed(7)
    names = {f"model.layers.{layer}.{kind}": sizes for layer in range(layers) for kind, sizes in SHAPES.items()}
    folder.mkdir()
    write_config("meta-llama/Meta-Llama-3-8B", folder, contract_arguments(dict.fromkeys(names, rank), 2.0))
    fall = 0.95 ** torch.arange(rank)
    specs = []
    for name, (inputs, outputs) in names.items():
        specs.append(TensorSpec(factor_key(name, "A"), torch.float32, (rank, inputs)))
        specs.append(TensorSpec(factor_key(name, "B"), torch.float32, (outputs, rank)))
    write_streaming(
        folder / ADAPTER_WEIGHTS, specs,
        lambda spec: torch.randn(spec.shape) * (fall if "lora_B" in spec.name else 1.0) / spec.shape[1] ** 0.5,
    )  # fmt: skip
    return sum(rank * (inputs + outputs) for inputs, outputs in names.values())


def processor_seconds() -> float:
    """Seconds that finished child processes have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(words: list[str], threads: int) -> tuple[float, float, int]:
    """Run the command line with these words, or only its imports: seconds, processor seconds, peak memory in bytes."""
    started, computed = time.perf_counter(), processor_seconds()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    answer = subprocess.run(
        [sys.executable, "-c", PEAK, *words], capture_output=True, text=True, check=False, env=environment
    )
    if answer.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{answer.stderr[-2000:]}")
    peak = int(answer.stdout.split()[-1]) * 1024
    return time.perf_counter() - started, processor_seconds() - computed, peak


def measure(layers: int, rank: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        parameters = write_adapter(scratch / "adapter", layers, rank)
        start_seconds, start_computed, start_bytes = measured([], threads)
        words = ["shrink", str(scratch / "adapter"), "--rank", str(rank // 4), "--out", str(scratch / "out")]
        seconds, computed, peak = measured(words, threads)
        document = json.loads((scratch / "out" / "shrink_certificate.json").read_text())
        ranks = [row["rank"] for row in document["modules"]]
    return {
        "layers": layers,
        "rank": rank,
        "threads": threads,
        "modules": len(ranks),
        "parameters": parameters,
        "parameters_after": document["parameters"],
        "ranks_after": [min(ranks), max(ranks)],
        "kept_energy": document["kept_energy"],
        "largest_relative_error": max(row["relative_error"] for row in document["modules"]),
        "seconds": round(seconds - start_seconds, 1),
        "processor_seconds": round(computed - start_computed, 1),
        "seconds_of_starting": round(start_seconds, 1),
        "memory_over_starting_mb": round((peak - start_bytes) / 1e6),
        "adapter_mb": round(parameters * 4 / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    results = measure(arguments.layers, arguments.rank, arguments.threads)
    print(json.dumps(results, indent=2))
    print(record.write_result("shrink", {"results": results}))


if __name__ == "__main__":
    main()
