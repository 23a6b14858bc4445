"""What choosing by quality leaves of each kind of data, and what ``tsq_min_cluster_share`` keeps of it: SmolLM2-135M.

Run: ``python benchmarks/diversity_guard.py [--data FOLDER] [--samples 96]``.

The rows are of known kinds: the three kinds of the demo's word problems, or, with ``--data``, GSM8K and BoolQ in
halves. A real run of one step of ``adaptive_method: tsq`` through LLaMA-Factory measures them; from the qualities and
clusters that its ``adaptive_samples.jsonl`` holds, subsets are drawn as a run draws them, with each floor. The run is
not told the kinds: its floors are under clusters of gradients. Shown are the share of every kind in the pool, in the
subsets (with ``tsq_draws: uniform`` its share of the draws, too) and in the draws with ``tsq_draws: quality``.
"""

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import planted
import record
import torch

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.sampling.pool import Pool


FLOORS = (0.0, 0.5, 1.0)
RATIOS = (0.7, 0.3)
SUBSETS = 50  # figures are means over so many
WORD_PROBLEMS = {"shopping": " buys ", "sharing": " keeps ", "collecting": " collects "}  # a word of each kind alone
Rows = list[tuple[str, str]]


def rows_of_kinds(data: str | None, scratch: Path, samples: int) -> tuple[Rows, list[str]]:
    """Rows as prompt and answer, and the kind of each."""
    if data is None:
        lines, pair = record.read_lines(*record.dataset_folder(None, scratch / "source"))
        rows = [pair(line) for line in lines[:samples]]
        return rows, [kind for prompt, _ in rows for kind, word in WORD_PROBLEMS.items() if word in prompt]
    rows, kinds = [], []
    for name in ("gsm8k", "boolq"):
        lines, pair = record.read_lines(*record.dataset_folder(data, scratch / name, name))
        rows += [pair(line) for line in lines[: samples // 2]]
        kinds += [name] * (samples // 2)
    return rows, kinds


def pool_of(samples: list[dict[str, Any]], ratio: float, floor: float) -> Pool:
    quality, loss = (torch.tensor([sample[key] for sample in samples]).double() for key in ("quality", "loss"))
    sampling = Tsq(TsqOptions(subset_ratio=ratio, draws="quality", min_cluster_share=floor)).sampling
    assert sampling is not None
    return Pool(quality, loss, sampling, 0, torch.tensor([sample["cluster"] for sample in samples]))


def shares(pool: Pool, kinds: list[str]) -> dict[str, dict[str, float]]:
    """Mean share of every kind in subsets, and in what is drawn from them by quality."""
    subset, draws = Counter(), Counter()
    for refresh in range(SUBSETS):
        chosen = pool.subset(refresh).tolist()
        for index, drawn in zip(chosen, pool.draw_shares(refresh).tolist(), strict=True):
            subset[kinds[index]] += 1 / len(chosen)
            draws[kinds[index]] += drawn
    return {name: {kind: round(found[kind] / SUBSETS, 4) for kind in sorted(set(kinds))}
            for name, found in (("subset", subset), ("draws", draws))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k and boolq (default: generated word problems)")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    _bootstrap.install()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["LLAMAFACTORY_ADAPTIVE_CACHE"] = str(scratch / "cache")
        rows, kinds = rows_of_kinds(arguments.data, scratch, arguments.samples)
        record.write_pool(scratch / "pool", rows)
        samples = planted.one_step(record.smollm2(), scratch / "pool", scratch / "out", arguments.batch_size)
    assert [sample["index"] for sample in samples] == list(range(len(kinds)))
    by_cluster = Counter((sample["cluster"], kind) for sample, kind in zip(samples, kinds, strict=True))
    pool = {kind: round(count / len(kinds), 4) for kind, count in sorted(Counter(kinds).items())}
    results = {}
    for ratio in RATIOS:
        for floor in FLOORS:
            key = f"subset_ratio {ratio:g}, min_cluster_share {floor:g}"
            results[key] = shares(pool_of(samples, ratio, floor), kinds)
            print(f"{key}: {results[key]}")
    written = record.write_result("diversity_guard", {
        "model": "SmolLM2-135M-Instruct", "data": "gsm8k and boolq" if arguments.data else "word_problems",
        "samples": len(samples), "subsets": SUBSETS, "pool": pool, "results": results,
        "effective_sample_size": round(pool_of(samples, 0.7, 0.0).effective_size, 2),
        "clusters": [{kind: by_cluster[cluster, kind] for kind in pool}
                     for cluster in range(1 + max(sample["cluster"] for sample in samples))],
    })  # fmt: skip
    print(f"pool: {pool}; written to {written}")


if __name__ == "__main__":
    main()
