"""Where wrong answers land in the quality order: SmolLM2-135M, a pool in which 30 % of the answers are shuffled.

Run: ``python benchmarks/planted.py [--data FOLDER] [--samples 256] [--share 0.3]``.

High gradient norm is known to like noise. A real run of one step of ``adaptive_method: tsq`` through LLaMA-Factory,
and what its ``adaptive_samples.jsonl`` says of the shuffled rows: their share among the best, and in subsets drawn
from its qualities with and without ``tsq_clip_quantile``. The share of the pool everywhere would mean that quality is
blind.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
from scipy.stats import mannwhitneyu

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.reports.data_report import SAMPLES_FILE, read_data_report
from llamafactory_adaptive.sampling.pool import Pool


QUANTILES = (1.0, 0.95, 0.9, 0.8, 0.7)
RATIOS = (0.7, 0.3)
DRAWS = 20
TOPS = (0.05, 0.1, 0.2, 0.5)


def write_pool(source: Path, name: str, folder: Path, samples: int, share: float) -> int:
    """The first rows of the pool with each other's answers; returns how many."""
    lines, pair = record.read_lines(source, name)
    rows = [pair(line) for line in lines[:samples]]
    shuffled = round(share * len(rows))
    answers = [answer for _, answer in rows]
    answers[:shuffled] = answers[1:shuffled] + answers[:1]
    record.write_pool(folder, [(question, answer) for (question, _), answer in zip(rows, answers, strict=True)])
    return shuffled


def one_step(model: Path, folder: Path, output: Path, batch_size: int, **more: Any) -> list[dict[str, Any]]:
    """A run of one step; what it says of every sample."""
    from llamafactory.train.tuner import run_exp

    run_exp({
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "adaptive",
        "adaptive_method": "tsq", "lora_rank": 8, "lora_target": "all", "dataset": "pool", "dataset_dir": str(folder),
        "template": "smollm2", "cutoff_len": 512, "max_steps": 1, "per_device_train_batch_size": batch_size,
        "bf16": True, "learning_rate": 1e-4, "output_dir": str(output), "save_strategy": "no", "report_to": "none",
        "use_cpu": not torch.accelerator.is_available(), "seed": 42, **more,
    })  # fmt: skip
    return [json.loads(line) for line in (output / SAMPLES_FILE).read_text().splitlines()]


def share_of(indices: list[int], shuffled: int) -> float:
    return round(sum(index < shuffled for index in indices) / len(indices), 4)


def order_figures(samples: list[dict[str, Any]], term: str, shuffled: int) -> dict[str, float]:
    """Share of shuffled rows among the highest and lowest of a term."""
    order = [sample["index"] for sample in sorted(samples, key=lambda sample: -sample[term])]
    figures = {f"best {top:.0%}": share_of(order[: round(top * len(order))], shuffled) for top in TOPS}
    figures["worst 10%"] = share_of(order[-round(0.1 * len(order)) :], shuffled)
    values = [sample[term] for sample in samples]
    u = mannwhitneyu(values[:shuffled], values[shuffled:]).statistic
    return figures | {"AUC": round(float(u) / (shuffled * (len(values) - shuffled)), 4)}


def share_in_subsets(samples: list[dict[str, Any]], shuffled: int, term: str, quantile: float, ratio: float) -> float:
    """Over subsets as a run would draw them from these qualities."""
    quality, tail = (torch.tensor([s[key] for s in samples]).double() for key in ("quality", term))
    sampling = Tsq(TsqOptions(clip_quantile=quantile, subset_ratio=ratio)).sampling
    assert sampling is not None
    pool = Pool(quality, tail, sampling, 0)
    return share_of([index for draw in range(DRAWS) for index in pool.subset(draw).tolist()], shuffled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    _bootstrap.install()
    model = record.smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["LLAMAFACTORY_ADAPTIVE_CACHE"] = str(Path(scratch) / "cache")
        source, name = record.dataset_folder(arguments.data, Path(scratch) / "source")
        folder = Path(scratch) / "pool"
        shuffled = write_pool(source, name, folder, arguments.samples, arguments.share)
        samples = one_step(model, folder, Path(scratch) / "plain", arguments.batch_size, tsq_alignment_weight=1e-9)
        effective = read_data_report(Path(scratch) / "plain")["effective_sample_size"]
    order = {term: order_figures(samples, term, shuffled) for term in ("quality", "loss", "alignment")}
    for term, figures in order.items():
        print(f"order by {term}: " + ", ".join(f"{key} {value:.3f}" for key, value in figures.items()))
    subsets = {
        f"by {term}, subset_ratio {ratio:g}, clip_quantile {quantile:g}": share_in_subsets(
            samples, shuffled, term, quantile, ratio
        )
        for term in ("loss", "gradient_norm")
        for ratio in RATIOS
        for quantile in QUANTILES
    }
    for key, value in subsets.items():
        print(f"share of shuffled rows, {key}: {value:.3f}")
    written = record.write_result("planted", {
        "model": "SmolLM2-135M-Instruct", "data": name, "samples": len(samples), "share": arguments.share,
        "order": order, "share_in_subsets": subsets, "draws": DRAWS, "effective_sample_size": round(effective, 2),
    })  # fmt: skip
    print(f"written to {written}")


if __name__ == "__main__":
    main()
