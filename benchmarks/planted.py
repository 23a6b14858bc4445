"""Where wrong answers land in the quality order: SmolLM2-135M, a pool in which 30 % of the answers are shuffled.

Run: ``python benchmarks/planted.py [--data FOLDER] [--samples 512] [--share 0.3]``.

High gradient norm is known to like noise. The share of shuffled rows among the best by quality, in the subsets that
are drawn, and what ``tsq_clip_quantile`` changes of it. A share of 0.3 everywhere would mean that quality does not see
them.
"""

import argparse
import tempfile
from pathlib import Path

import record
import torch
from quality_pass import adapted, batch_of, layers
from scipy.stats import mannwhitneyu

from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.quality import Wanted, length_sorted, measure
from llamafactory_adaptive.sampling import Pool, combine_terms


QUANTILES = (1.0, 0.95, 0.9, 0.8, 0.7)
RATIOS = (0.7, 0.3)
DRAWS = 20


def share(indices: torch.Tensor, shuffled: int) -> float:
    """Of shuffled rows, which come first in the pool."""
    return round(float((indices < shuffled).double().mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=4)
    arguments = parser.parse_args()
    path = record.smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = record.dataset_folder(arguments.data, Path(scratch))
        rows = record.read_rows(folder, name, path, arguments.samples, True, arguments.share)
    shuffled = round(arguments.share * len(rows))
    model = adapted(path, 8, torch.bfloat16)
    groups = length_sorted([len(row["input_ids"]) for row in rows], arguments.batch_size)
    batches = [(group, batch_of(rows, group)) for group in groups]
    terms = measure(model, layers(model), batches, len(rows), Wanted(1e-4, False, "projected", 1024, 0))

    results: dict[str, dict[str, float]] = {}
    for label, weights in (("default", (1.0, 1.0, 0.0)), ("alignment", (0.0, 0.0, 1.0)), ("loss", None)):
        quality = (
            terms.loss if weights is None
            else combine_terms((terms.gradient_norm, terms.loss_drop, terms.alignment), weights)
        )  # fmt: skip
        order = quality.argsort(descending=True)
        found = {f"best {top:.0%}": share(order[: round(top * len(rows))], shuffled) for top in (0.05, 0.1, 0.2, 0.5)}
        found["worst 10%"] = share(order[-round(0.1 * len(rows)) :], shuffled)
        u = mannwhitneyu(quality[:shuffled].numpy(), quality[shuffled:].numpy()).statistic
        found["AUC"] = round(float(u) / (shuffled * (len(rows) - shuffled)), 4)
        results[label] = found
        print(f"order by {label}: " + ", ".join(f"{key} {value:.3f}" for key, value in found.items()))
    quality = combine_terms((terms.gradient_norm, terms.loss_drop, terms.alignment), (1.0, 1.0, 0.0))
    subsets: dict[str, float] = {}
    for ratio in RATIOS:
        for quantile in QUANTILES:
            sampling = Tsq(TsqOptions(clip_quantile=quantile, subset_ratio=ratio)).sampling
            assert sampling is not None
            pool = Pool(quality, terms.gradient_norm, sampling, 0)
            drawn = torch.cat([pool.subset(refresh) for refresh in range(DRAWS)])
            subsets[f"subset_ratio {ratio:g}, clip_quantile {quantile:g}"] = share(drawn, shuffled)
    for key, value in subsets.items():
        print(f"share of shuffled rows, {key}: {value:.3f}")
    sizes = {}
    for temperature in (0.7, 1.4, 2.8, 5.6):
        sampling = Tsq(TsqOptions(temperature=temperature)).sampling
        sizes[f"temperature {temperature:g}"] = round(
            Pool(quality, terms.gradient_norm, sampling, 0).effective_size, 2
        )
    print("effective sample size: " + ", ".join(f"{key} {value}" for key, value in sizes.items()))
    written = record.write_result("planted", {
        "model": "SmolLM2-135M-Instruct", "data": name, "samples": len(rows), "shuffled": shuffled,
        "order": results, "share_in_subsets": subsets, "draws": DRAWS,
        "effective_sample_size": sizes,
    })  # fmt: skip
    print(f"written to {written}")


if __name__ == "__main__":
    main()
