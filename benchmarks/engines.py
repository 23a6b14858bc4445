"""Do all engines find the same ranks, and does a killed run end as if it had not been: IGU-LoRA on SmolLM2-135M.

Run: ``python benchmarks/engines.py [--data FOLDER] [--steps 30] [--bf16]``.

One global batch of 4 x 64 tokens a step, in one process and in two (DDP, ZeRO-1, 2, 3); then a run of one process
that is killed with SIGKILL after a checkpoint and started again. Every run is the command a user types. Targets: 97 %
of the modules at the same rank as in one process; after the kill, all of them, and the last loss within 1e-3.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import yaml


ZERO2 = Path(__file__).parents[1] / "examples" / "deepspeed" / "ds_z2_config.json"
ZERO3 = ZERO2.with_name("ds_z3_config.json")
TARGETS = {"same_rank": 0.97, "resumed_same_rank": 1.0, "resumed_loss_difference": 1e-3}


def settings(model: Path, folder: Path, dataset: str, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "adaptive",
        "adaptive_method": "igu", "adaptive_interval": 5, "lora_rank": 8, "lora_target": "all", "dataset": dataset,
        "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 64, "packing": True,
        "max_steps": options.steps, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": options.steps // 3, "report_to": "none", "use_cpu": True, "bf16": options.bf16,
        "output_dir": str(output), "seed": 42,
    }  # fmt: skip


def launch(args: dict[str, Any], processes: int, scratch: Path, wait: bool = True) -> subprocess.Popen[bytes]:
    path = scratch / f"{Path(args['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump({**args, "per_device_train_batch_size": 4 // processes}))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if processes > 1:
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": "1"}
    with open(path.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(["llamafactory-cli", "train", str(path)], env=environment, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=log)  # fmt: skip
    if wait and process.wait() != 0:
        raise SystemExit(f"{path.name} failed:\n" + path.with_suffix(".log").read_text()[-3000:])
    return process


def outcome(folder: Path) -> tuple[list[int], float]:
    """Ranks in model order, and the last logged loss."""
    plan = json.loads((folder / "adaptive_rank_plan.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["rank"] for entry in plan["modules"]], [e["loss"] for e in history if "loss" in e][-1]


def against(reference: tuple[list[int], float], run: tuple[list[int], float]) -> dict[str, float]:
    same = sum(a == b for a, b in zip(reference[0], run[0], strict=True))
    return {"same_rank": same / len(reference[0]), "loss_difference": abs(reference[1] - run[1])}


def kill_and_resume(args: dict[str, Any], scratch: Path, at: int) -> None:
    process = launch(args, 1, scratch, wait=False)
    while not (Path(args["output_dir"]) / f"checkpoint-{at}" / "adaptive_rank_plan.json").exists():
        if process.poll() is not None:
            raise SystemExit("the run to be killed ended by itself")
        time.sleep(0.1)
    time.sleep(5)  # some steps further
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    launch(args, 1, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated rows)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--keep", type=Path, help="folder for the outputs of all runs (default: thrown away)")
    parser.add_argument("--bf16", action="store_true", help="bf16 in place of fp32")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = options.keep or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        folder, dataset = record.dataset_folder(options.data, scratch / "data")
        model = record.smollm2() if options.bf16 else record.smollm2_in_fp32(scratch / "SmolLM2-135M-Instruct")

        def make(output: str, **more: Any) -> dict[str, Any]:
            return settings(model, folder, dataset, scratch / output, options) | more

        launch(make("alone"), 1, scratch)
        reference = outcome(scratch / "alone")
        print(f"one process: ranks {min(reference[0])}-{max(reference[0])}, last loss {reference[1]:.4f}", flush=True)
        kill_and_resume(make("killed"), scratch, options.steps // 3)
        rows["killed and resumed"] = against(reference, outcome(scratch / "killed"))
        zero1 = scratch / "z1.json"
        document = json.loads(ZERO2.read_text())
        document["zero_optimization"]["stage"] = 1
        zero1.write_text(json.dumps(document))
        for engine, config in (("DDP", None), ("ZeRO-1", zero1), ("ZeRO-2", ZERO2), ("ZeRO-3", ZERO3)):
            launch(make(engine, **({"deepspeed": str(config)} if config else {})), 2, scratch)
            rows[f"{engine}, 2 processes"] = against(reference, outcome(scratch / engine))
        for kind, row in rows.items():
            print(f"{kind:<22} {row['same_rank']:.1%} of {len(reference[0])} modules at the same rank, last loss off "
                  f"by {row['loss_difference']:.2e}")  # fmt: skip
    path = record.write_result("engines", {
        "model": "SmolLM2-135M-Instruct", "method": "igu", "global_batch": "4 x 64 tokens", "dataset": dataset,
        "steps": options.steps, "precision": "bf16" if options.bf16 else "fp32", "targets": TARGETS,
        "modules": len(reference[0]), "ranks": sorted(set(reference[0])), "last_loss": reference[1], "runs": rows,
    })  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
