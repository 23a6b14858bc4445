"""Sensitivity-LoRA once more, outside the package: does the product do what the paper's formulas say?

Run: ``python benchmarks/recomputation.py [--data FOLDER] [--samples 64]``.

The product plans SmolLM2-135M through its command line. Then the same rows are tokenised by LLaMA-Factory, every
module's inputs are captured with plain hooks, and lambda, the three metrics, theta and the water level are computed in
NumPy. It shares no arithmetic with the package. Targets: theta agrees to 1 %; Kendall's tau between theta and the
ranks above 0.9; no rank more than 1.5 from its water-filled share.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import record
import yaml
from scipy.stats import kendalltau


def plan_by_command(folder: Path, name: str, model: Path, samples: int, scratch: Path) -> tuple[dict, dict]:
    """The product's own answer, by the command a user would type; also returns the settings."""
    settings = {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "adaptive",
        "lora_rank": 8, "lora_target": "all", "dataset": name, "dataset_dir": str(folder), "template": "smollm2",
        "cutoff_len": 512, "output_dir": str(scratch / "out"), "bf16": True, "use_cpu": True, "report_to": "none",
        "adaptive_calibration_samples": samples, "max_samples": 2000, "sensitivity_transform": "none",
    }  # fmt: skip
    path = scratch / "recompute.yaml"
    path.write_text(yaml.safe_dump(settings))
    program = Path(sys.executable).with_name("llamafactory-adaptive")
    subprocess.run([str(program), "plan", str(path)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((scratch / "out" / "adaptive_rank_plan.json").read_text()), settings


def capture(settings: dict, names: list[str], samples: int, scratch: Path) -> dict[str, np.ndarray]:
    """lambda per module: one row at a time, so that there is no padding to leave out, summed in NumPy."""
    import torch
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer
    from transformers import AutoModelForCausalLM

    plain = {k: v for k, v in settings.items() if not k.startswith("adaptive_")}
    plain |= {"finetuning_type": "lora", "output_dir": str(scratch / "plain")}
    model_args, data_args, training_args, _, _ = get_train_args(plain)
    modules = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(modules["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **modules)["train_dataset"]
    model = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"], dtype=torch.bfloat16).eval()
    sums, tokens = dict.fromkeys(names, 0.0), 0

    def hook(name):
        def add(module, args):
            sums[name] = sums[name] + np.square(args[0][0].double().numpy()).sum(0)

        return add

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for index in sorted(random.Random(42).sample(range(len(rows)), samples)):
            ids = rows[index]["input_ids"]
            model(input_ids=torch.tensor([ids]))
            tokens += len(ids)
    return {name: value / tokens for name, value in sums.items()}


def theta_of(lams: list[np.ndarray]) -> np.ndarray:
    """The paper in six lines: trace, mean of the upper half, effective rank at 85 %, weighed by sigma / mu^2."""
    ordered = [np.sort(lam)[::-1] for lam in lams]
    trace = np.array([lam.sum() for lam in ordered])
    top = np.array([lam[: len(lam) // 2].mean() for lam in ordered])
    rank = np.array([1 + int((np.cumsum(lam) < 0.85 * lam.sum()).sum()) for lam in ordered], float)
    local = top.std() / top.mean() ** 2 * top + rank.std() / rank.mean() ** 2 * rank
    return trace.std() / trace.mean() ** 2 * trace + local.std() / local.mean() ** 2 * local


def water_level(theta: np.ndarray, cost: np.ndarray, budget: float, low: float, high: float) -> np.ndarray:
    """Bisection on clip(level * theta, low, high)."""
    under, over = 0.0, high / theta.min()
    for _ in range(200):
        level = (under + over) / 2
        spent = (np.clip(level * theta, low, high) * cost).sum()
        under, over = (level, over) if spent < budget else (under, level)
    return np.clip(under * theta, low, high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        folder, name = record.dataset_folder(arguments.data, scratch / "data")
        model = record.smollm2()
        plan, settings = plan_by_command(folder, name, model, arguments.samples, scratch)
        entries = plan["modules"]
        lams = capture(settings, [entry["name"] for entry in entries], arguments.samples, scratch)
    theta = theta_of(list(lams.values()))
    cost = np.array([entry["in_features"] + entry["out_features"] for entry in entries])
    ranks = np.array([entry["rank"] for entry in entries])
    product = np.array([entry["score"] for entry in entries])
    ideal = water_level(product, cost, 8 * cost.sum(), 1, 32)
    own_ideal = water_level(theta, cost, 8 * cost.sum(), 1, 32)
    free = (ideal > 1) & (ideal < 32)
    shares = np.sort(theta / theta.sum())[::-1]
    results = {
        "theta_largest_relative_difference": float(np.abs(product / theta - 1).max()),
        "tau_theta_ranks": float(kendalltau(theta, ranks).statistic),
        "tau_theta_water_filled": float(kendalltau(theta, own_ideal).statistic),
        "tau_theta_ranks_between_the_bounds": float(kendalltau(theta[free], ranks[free]).statistic),
        "modules_at_a_bound": int((~free).sum()),
        "largest_distance_from_water_filled_share": float(np.abs(ranks - ideal).max()),
        "share_of_the_three_largest": float(shares[:3].sum()),
        "budget_left_parameters": int(8 * cost.sum() - (ranks * cost).sum()),
    }
    for key, value in results.items():
        print(f"{key:<42} {value:.4g}")
    path = record.write_result("recomputation", {"data": name, "samples": arguments.samples, "modules": len(entries),
                                                 "results": results})  # fmt: skip
    print(f"written to {path}")


if __name__ == "__main__":
    main()
