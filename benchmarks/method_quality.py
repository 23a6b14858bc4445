"""IGU-LoRA part by part, against plain LoRA: which choices make the method good.

Run: ``python benchmarks/method_quality.py [--seeds 5] [--arms ...] [--ranks 4,1,2]``, and on a real model: ``python
benchmarks/method_quality.py --model smollm2 [--data FOLDER]``.

Without ``--model``, a Llama of 3 layers is pretrained on sequences from a random source (each token depends on the two
before it), then adapted to a source that shares most of its rules. A seed gives the rows, their order and the
adapter's start; with SmolLM2-135M, which learns rows of GSM8K of at most 136 tokens, order and start alone. Every arm
runs over one grid of learning rates, with the first ``--rate-seeds`` seeds; where the best of them is an end of the
grid, it is extended by a factor of 2, ``--extensions`` times at most. The rate that is best on one half of the
held-out rows is then run with all seeds; whether the default is equivalent to plain LoRA takes more of them. The other
half, which chose nothing, judges. Differences to plain LoRA, to ``published`` and to the arm without the part in
question are taken seed by seed, with 95 % intervals and p values of Student's t (Holm over arms). Both halves' curves
over the rate are kept. An arm is equivalent to plain LoRA if two one-sided tests at 5 % put the difference within half
a per cent of its loss.

Training is the product's own: ``rank_search`` under transformers' Trainer. What is judged is the adapter as it would
be saved, cut to its budget. Each finished run is a line of ``results/NAME.ledger.jsonl``, or of ``--ledger``; what
stands there is not run again. Commands with other ``--arms`` may run beside each other; the last one, with all arms,
sums up.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
import torch
from method_arms import ARMS, FEWER, ON_SMOLLM2, of_budget
from method_tasks import SmallTask, SmolLM2Task, Task, loss_of, padded
from paired_seeds import tell_differences, verdict
from scipy import stats
from short_runs import Ledger


@dataclass(frozen=True)
class Run:
    """Settings of one run; the key of its line in the ledger."""

    arm: str
    method: str
    options: str
    rank: int
    rate: float
    seed: int
    steps: int


def arguments(task: Task, run: Run, output: str) -> Any:
    """Build the Trainer's arguments: AdamW, warm-up over a tenth of the steps, linear decay."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output,
        max_steps=run.steps,
        per_device_train_batch_size=task.batch_size,
        learning_rate=run.rate,
        warmup_steps=run.steps // 10,
        lr_scheduler_type="linear",
        bf16=task.bf16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=run.steps,
        seed=run.seed,
        use_cpu=not torch.accelerator.is_available(),
    )


def train(task: Task, run: Run) -> dict[str, Any]:
    """Adapt the base, and judge what would be saved on both halves of the held-out rows."""
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(run.seed)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.bfloat16 if task.bf16 else torch.float32)
    data = {"train_dataset": task.training_rows(run.seed), "data_collator": padded}
    with tempfile.TemporaryDirectory() as output:
        adapt = adapt_plainly if run.method in ("lora", "cut", "random") else adapt_searching
        model, facts = adapt(model, run, task.targets, {"args": arguments(task, run, output), **data})
    dev, test = (loss_of(model, rows) for rows in task.held_out())
    return {"dev": dev, "test": test, **facts, "seconds": round(time.perf_counter() - started, 1)}


def adapt_plainly(model: Any, run: Run, targets: str, data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Train plain LoRA; for ``cut`` of twice the rank, cut to the budget at the end; for ``random`` on such ranks."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    from llamafactory_adaptive import attach_adapter, plan_ranks, score_modules

    if run.method == "random":
        scores = score_modules(model, [], "random", targets, seed=run.seed)
        model = attach_adapter(model, plan_ranks(scores, lora_rank=run.rank))
    else:
        rank = run.rank * (2 if run.method == "cut" else 1)
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    Trainer(model=model, **data).train()
    if run.method == "cut":
        cut_by_norm(model, run.rank)
    return model, {}


def adapt_searching(model: Any, run: Run, targets: str, data: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Train while a dynamic method searches for ranks."""
    from transformers import Trainer

    from llamafactory_adaptive import rank_search

    options = {"interval": 10 if run.steps >= 200 else 5, **json.loads(run.options)}
    search = rank_search(model, run.method, lora_rank=run.rank, seed=run.seed, **options)
    trainer = search.trainer(Trainer)(model=search.model, **data)
    trainer.train()
    return trainer.model, changes(Path(data["args"].output_dir) / "adaptive_log.jsonl")


def cut_by_norm(model: Any, rank: int) -> None:
    """Remove the components of smallest norm of ``B_i A_i``, until as many parameters are left as at ``rank``."""
    from llamafactory_adaptive.ranks.allocation import Bounds, keep_components

    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    factors = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in layers]
    scores = [(a.norm(dim=1) * b.norm(dim=0)).tolist() for a, b in factors]
    costs, high = [a.shape[1] + b.shape[0] for a, b in factors], [len(row) for row in scores]
    masks = keep_components(scores, Bounds(costs, rank * sum(costs), [1] * len(costs), high))
    for (a, _), mask in zip(factors, masks, strict=True):
        a.data.mul_(torch.tensor(mask, dtype=a.dtype)[:, None])


def changes(log: Path) -> dict[str, Any]:
    """Sum up the allocations of a run: components that changed, and the ranks at the end."""
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if line.get("event") == "allocation"]
    return {"components_changed": sum(line["components_changed"] for line in lines), "ranks": lines[-1]["ranks"]}


def outcome(ledger: Ledger, task: Task, run: Run) -> dict[str, Any]:
    """Return what came of a run, which is made and told of if the ledger does not hold it."""

    def compute() -> dict[str, Any]:
        held = train(task, run)
        print(f"rank {run.rank}  {run.arm:<40} rate {run.rate:<7g} seed {run.seed}  loss {held['test']:.4f}  "
              f"{held['seconds']:.0f} s", flush=True)  # fmt: skip
        return held

    held: dict[str, Any] = ledger.result(asdict(run), compute)
    return held


def compare(task: Task, ledger: Ledger, arms: Sequence[str], rank: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run arms at their own best rates, and compare them with plain LoRA and ``published``."""
    rows: dict[str, dict[str, Any]] = {}
    for arm in arms:
        method, settings = of_budget(arm, rank)
        start = (arm, method, json.dumps(settings, sort_keys=True), rank)

        def run(rate: float, seeds: int, start: tuple[str, str, str, int] = start) -> list[dict[str, Any]]:
            return [outcome(ledger, task, Run(*start, rate, seed, options.steps)) for seed in range(seeds)]

        curve = curve_of(lambda rate, run=run: run(rate, options.rate_seeds), task.rates, options.extensions)
        best = best_rate(curve)
        runs = run(best, options.seeds_of_default if arm in ("lora", "corrected") else options.seeds)
        rows[arm] = row_of(runs, best, curve, rank)
    tell_differences(rows)
    return rows


Curve = dict[float, list[dict[str, Any]]]


def curve_of(run: Callable[[float], list[dict[str, Any]]], rates: Sequence[float], extensions: int) -> Curve:
    """Run over a grid of rates, and beyond the end of it that is best."""
    curve = {rate: run(rate) for rate in rates}
    for _ in range(extensions):
        best = best_rate(curve)
        if min(curve) < best < max(curve):
            break
        further = best * 2 if best == max(curve) else best / 2
        curve[further] = run(further)
    return dict(sorted(curve.items()))


def best_rate(curve: Curve) -> float:
    """Choose the rate that is best on the half that chooses."""
    return min(curve, key=lambda rate: statistics.fmean(each["dev"] for each in curve[rate]))


def row_of(runs: Sequence[dict[str, Any]], best: float, curve: Curve, rank: int) -> dict[str, Any]:
    """Sum up one arm at its best rate."""
    losses = [run["test"] for run in runs]
    row = {
        "rate": best,
        "rate_at_the_edge": best in (min(curve), max(curve)),
        "loss": statistics.fmean(losses),
        "losses": losses,
        "losses_of_choosing": [run["dev"] for run in runs],
        "curve": {f"{rate:g}": [each["test"] for each in at] for rate, at in curve.items()},
        "curve_of_choosing": {f"{rate:g}": [each["dev"] for each in at] for rate, at in curve.items()},
        "seconds": statistics.fmean(run["seconds"] for run in runs),
    }
    if "ranks" in runs[0]:
        row["components_changed"] = statistics.fmean(run["components_changed"] for run in runs)
        row["components_returned"] = statistics.fmean(returned(run, rank) for run in runs)
        row["rank_correlation_of_seeds"] = mean_correlation([run["ranks"] for run in runs])
    return row


def returned(run: dict[str, Any], rank: int) -> float:
    """Count the components that came back: each is removed once more than what is over at the end."""
    over = 2 * rank * len(run["ranks"]) - sum(run["ranks"])
    return float(run["components_changed"] - over) / 2


def mean_correlation(allocations: Sequence[Sequence[int]]) -> float | None:
    """Average Spearman's correlation over all pairs of allocations; None where ranks are all equal."""
    pairs = list(all_pairs([ranks for ranks in allocations if len(set(ranks)) > 1]))
    return statistics.fmean(float(stats.spearmanr(a, b).statistic) for a, b in pairs) if pairs else None


def all_pairs(items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Iterate over all pairs of different items."""
    for index, first in enumerate(items):
        for second in items[index + 1 :]:
            yield first, second


def told(row: dict[str, Any]) -> str:
    """Say in one line what a row holds."""
    words = [f"rate {row['rate']:<7g}loss {row['loss']:.4f}"]
    for rival in ("lora", "published"):
        if (over := row.get(f"over_{rival}")) is not None:
            reach = f" ({over['low']:+.4f} to {over['high']:+.4f})" if "low" in over else ""
            same = ", equivalent within 0.5 %" if over["equivalent"] else ""
            words.append(f"over {rival} {over['mean']:+.4f}{reach}: {verdict(over)}{same}")
    return "  ".join(words) + ("  (its best rate is the end of the list)" if row["rate_at_the_edge"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("small", "smollm2"), default="small")
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl, for smollm2 (default: generated word problems)")
    parser.add_argument("--arms", help=f"semicolon separated, of: {'; '.join(ARMS)} (default: all, for smollm2 a few)")
    parser.add_argument("--ranks", help="budgets; a few arms run at those after the first (default: 4,1,2, or 8)")
    parser.add_argument("--seeds", type=int, help="default: 5, or 3 for smollm2")
    parser.add_argument("--seeds-of-default", type=int, help="of plain LoRA and corrected alone (smollm2: 10)")
    parser.add_argument("--rate-seeds", type=int, help="seeds that choose the rate (default: 2, or 1 for smollm2)")
    parser.add_argument("--steps", type=int, help="default: 300, or 100 for smollm2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--extensions", type=int, default=2, help="of a grid whose end is best, each by a factor of 2")
    parser.add_argument("--ledger", type=Path, help="file of finished runs (default: results/NAME.ledger.jsonl)")
    options = parser.parse_args()
    small = options.model == "small"
    defaults = {"ranks": "4,1,2", "seeds": 5, "rate_seeds": 2, "steps": 300} if small else {
        "ranks": "8", "seeds": 3, "seeds_of_default": 10, "rate_seeds": 1, "steps": 100}  # fmt: skip
    for key, value in defaults.items():
        setattr(options, key, getattr(options, key) or value)
    options.seeds_of_default = max(options.seeds, options.seeds_of_default or 0)
    arms = options.arms.split("; ") if options.arms else list(ARMS if small else ON_SMOLLM2)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise SystemExit(f"--arms: {', '.join(unknown)} is none of {'; '.join(ARMS)}")
    torch.set_num_threads(options.threads)
    name = "method_quality" if small else "method_quality_smollm2"
    path = options.ledger or record.RESULTS / f"{name}.ledger.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = record.cache("method_quality") if small else Path(scratch)
        task, ledger = (SmallTask if small else SmolLM2Task)(folder, options.data), Ledger(path)
        first, *others = [int(rank) for rank in options.ranks.split(",")]
        results = {str(first): compare(task, ledger, arms, first, options)}
        fewer = [arm for arm in arms if arm in FEWER]
        results |= {str(rank): compare(task, ledger, fewer, rank, options) for rank in others}
    for rank, rows in results.items():
        for arm, row in rows.items():
            print(f"rank {rank}  {arm:<40} {told(row)}")
    written = record.write_result(name, {
        "task": task.description, "steps": options.steps, "batch_size": task.batch_size, "rates": task.rates,
        "extensions": options.extensions, "rate_seeds": options.rate_seeds, "seeds": options.seeds,
        "seeds_of_default": options.seeds_of_default,
        "device": "cpu",
        "arms": {arm: {"method": ARMS[arm][0], "options": ARMS[arm][1]} for arm in arms},
        "results_by_rank": results,
    })  # fmt: skip
    print(f"written to {written}")


if __name__ == "__main__":
    main()
