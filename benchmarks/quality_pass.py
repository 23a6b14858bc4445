"""What scoring training samples costs: SmolLM2-135M, 256 rows, everything as ratios within one run.

Run: ``python benchmarks/quality_pass.py [--data FOLDER] [--dataset gsm8k|boolq] [--samples 256] [--turns 8]``.

  over_epoch               one scoring pass of what a tsq run scores (live rank 32, masked to 8) / one plain forward
                           and backward pass of LoRA of rank 8 over the same rows in random order, as an epoch of
                           training runs it (loss over answers, gradients of the LoRA factors, no optimizer)
  over_sorted_epoch        the same, but the epoch's batches are sorted by length, too: what is left is the scoring
  projected_over_epoch     scoring with alignments by random projection / the epoch
  per_sample_over_scoring  one backward pass per sample of that same live adapter, with the norm of its gradients / one
                           scoring pass; what batches save shows where one sample does not fill a device: short rows,
                           or a GPU
  plain_per_sample_over_scoring  the same backward passes on plain LoRA of rank 8, which has the same norms

All kinds take turns, a part of the rows each, so that a machine whose speed drifts treats them alike. Norms of both
ways are compared, too, in fp32 on some rows.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import record
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llamafactory_adaptive.adapter.lora import live_layers
from llamafactory_adaptive.adapter.masked_lora import Triplets
from llamafactory_adaptive.calibration.batches import length_sorted, make_batches
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.sampling.quality import measure
from llamafactory_adaptive.sampling.sample_gradients import TermSpec


TARGETS = {"over_epoch": 1.25, "per_sample_over_scoring": 3.0, "largest_norm_error": 1e-4}
WANTED = TermSpec(1e-4, False, "none", 1, 0)
PROJECTED = TermSpec(1e-4, False, "projected", 1024, 0)
LIVE = 4  # times the budget: the default of adaptive_max_rank


def adapted(path: Path, rank: int, dtype: torch.dtype) -> torch.nn.Module:
    """A new adapter, B zero, as scoring meets it."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def live_form(path: Path, rank: int) -> torch.nn.Module:
    """What a tsq run scores: tensors of the largest rank, masked to the budget."""
    model = adapted(path, LIVE * rank, torch.bfloat16)
    modules = tuple(
        ModulePlan(name, layer.in_features, layer.out_features, rank=LIVE * rank)
        for name, (layer, _) in live_layers(model).items()
    )
    triplets = Triplets(model, RankPlan("tsq", {}, "params", rank, 2.0 * rank, modules), None, "lora", 0)
    triplets.mask([[index < rank for index in range(LIVE * rank)] for _ in modules])
    return model


def layers(model: torch.nn.Module) -> dict:
    return {name: (layer.lora_A[a], layer.lora_B[a]) for name, (layer, a) in live_layers(model).items()}


def batch_of(rows: list, group: list[int]) -> dict[str, torch.Tensor]:
    (one,) = make_batches([rows[index] for index in group], len(group), 0)
    return {"input_ids": one.input_ids, "attention_mask": one.attention_mask, "labels": one.labels}


def train_batch(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs, use_cache=False).loss.backward()


def norm_of_gradients(model: torch.nn.Module) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.stack([g.float().square().sum() for g in gradients]).sum().sqrt())


def one_by_one(model: torch.nn.Module, rows: list, indices: list[int]) -> list[float]:
    norms = []
    for index in indices:
        model.zero_grad()
        train_batch(model, batch_of(rows, [index]))
        norms.append(norm_of_gradients(model))
    model.zero_grad()
    return norms


def largest_norm_error(path: Path, rank: int, rows: list) -> float:
    """Against one backward pass per sample, fp32, B not zero, padding in every batch."""
    model = adapted(path, rank, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.01)
    few = rows[:12]
    groups = length_sorted([len(row["input_ids"]) for row in few], 4)
    terms = measure(model, layers(model), [(g, batch_of(few, g)) for g in groups], len(few), WANTED, quiet=True)
    exact = torch.tensor(one_by_one(model.eval(), few, list(range(len(few))))).double()
    return float((terms.gradient_norm / exact - 1).abs().max())


def times(model: torch.nn.Module, live: torch.nn.Module, rows: list, batch_size: int, turns: int) -> dict[str, float]:
    by_length = length_sorted([len(row["input_ids"]) for row in rows], batch_size)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    shuffled = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def score(part, wanted):
        batches = [(group, batch_of(rows, group)) for group in by_length[part]]
        measure(live, layers(live), batches, len(rows), wanted, quiet=True)

    def epoch(groups):
        for group in groups:
            train_batch(model, batch_of(rows, group))
        model.zero_grad()

    def picked(part):
        return order[part.start * batch_size : part.stop * batch_size]

    kinds = {
        "epoch": lambda part: epoch(shuffled[part]),
        "sorted_epoch": lambda part: epoch(by_length[part]),
        "scoring": lambda part: score(part, WANTED),
        "projected": lambda part: score(part, PROJECTED),
        "plain_per_sample": lambda part: one_by_one(model, rows, picked(part)),
        "per_sample": lambda part: one_by_one(live, rows, picked(part)),
    }
    seconds = dict.fromkeys(kinds, 0.0)
    edges = [round(turn * len(by_length) / turns) for turn in range(turns + 1)]
    model.train()
    live.train()
    for action in kinds.values():  # warms up
        action(slice(0, 1))
    for turn in range(turns):
        for kind, action in kinds.items():
            started = time.perf_counter()
            action(slice(edges[turn], edges[turn + 1]))
            seconds[kind] += time.perf_counter() - started
        print(f"part {turn + 1} of {turns}: " + ", ".join(f"{k} {v:.1f} s" for k, v in seconds.items()), flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl (default: generated word problems)")
    parser.add_argument("--dataset", default="gsm8k", choices=("gsm8k", "boolq"), help="long rows, or short ones")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    path = record.smollm2()
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = record.dataset_folder(arguments.data, Path(scratch), arguments.dataset)
        rows = record.read_rows(folder, name, path, arguments.samples, answers_only=True)
    error = largest_norm_error(path, arguments.rank, rows)
    plain, live = adapted(path, arguments.rank, torch.bfloat16), live_form(path, arguments.rank)
    seconds = times(plain, live, rows, arguments.batch_size, arguments.turns)
    results = {
        "over_epoch": round(seconds["scoring"] / seconds["epoch"], 4),
        "over_sorted_epoch": round(seconds["scoring"] / seconds["sorted_epoch"], 4),
        "projected_over_epoch": round(seconds["projected"] / seconds["epoch"], 4),
        "per_sample_over_scoring": round(seconds["per_sample"] / seconds["scoring"], 4),
        "plain_per_sample_over_scoring": round(seconds["plain_per_sample"] / seconds["scoring"], 4),
        "largest_norm_error": error,
    }
    for key, value in results.items():
        print(f"{key:<30} {value:<10.4g} target {TARGETS.get(key, 'none')}")
    written = record.write_result("quality_pass" if name == "boolq" else f"quality_pass_{name}", {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "data": name, "samples": len(rows),
        "rank": arguments.rank, "live_rank": LIVE * arguments.rank, "batch_size": arguments.batch_size,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "results": results, "targets": TARGETS, "seconds": {k: round(v, 2) for k, v in seconds.items()},
    })  # fmt: skip
    print(f"written to {written}")


if __name__ == "__main__":
    main()
