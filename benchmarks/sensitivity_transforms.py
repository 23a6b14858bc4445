"""Which reading of Sensitivity-LoRA's metrics should be the default: how it spends the budget, how steadily, how well.

Run: ``python benchmarks/sensitivity_transforms.py [--data FOLDER] [--models NAME[=CHECKPOINT],...]
[--train NAME,...] [--seeds 3] [--steps 60] [--keep FOLDER]``.

Most of an hour on one core; with ``--keep`` it goes on where it was.

Models: SmolLM2-135M, a small Qwen3 that the script pretrains, and any checkpoint named with ``--models``. Readings:
the choices of ``sensitivity_transform``, and two that the package does not have: ``log_per_type`` (logarithm and
median within each type of module), ``no_first_token`` (the paper's formula, but the first token of a row does not
count: it is where massive activations are said to sit).

  spending   share of the score and of the parameters that the top three modules take, modules at their largest and
             smallest rank, median rank, entropy of the ranks (1: uniform)
  agreement  of two halves of the calibration rows, and of two data sets: Spearman's correlation of scores and ranks,
             and the share of the ranks that lies elsewhere
  loss       on held-out rows after short trainings of plain LoRA at the same budget, against ``uniform``, ``random``
             and the paper's ``none``. alpha/r is the same in every module of every arm, so all take one learning rate.
             Differences are taken seed by seed and judged as in paired_seeds.py

The rule, written down before the figures were seen (``choose``): (1) a reading whose held-out loss is worse than that
of ``none`` or ``uniform`` beyond doubt (p < 0.05 after Holm) on any model is out. (2) Of the rest, those stay whose
largest top-three share of the score over the models lies within 5 points of the smallest such share. (3) Of these the
one whose least agreement, over models, halves and data sets, is the highest. ``no_first_token`` is shown, but not
eligible: packed rows have no first token.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
import short_runs
from paired_seeds import holm, paired, verdict
from sensitivity_readings import CONTROLS, ELIGIBLE, READINGS, Moments, bounds, figures, moments_of, scores
from torch import nn

from llamafactory_adaptive.api.targets import find_targets
from llamafactory_adaptive.ranks.allocation import allocate
from llamafactory_adaptive.ranks.plan import ModuleShape


SMALL_COURSE = {"steps": 40, "rate": 5e-3, "tokens": 160}  # its vocabulary makes rows longer


def planned(
    moments: Mapping[str, Moments], shapes: Sequence[ModuleShape], rank: int, arm: str, seed: int
) -> dict[str, int]:
    values = scores(arm, moments["both"], shapes, rank, seed)
    ranks = allocate(values, bounds(shapes, rank)).ranks
    return {shape.name: chosen for shape, chosen in zip(shapes, ranks, strict=True)}


def compared(losses: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Every arm's mean loss, and its paired difference from ``none`` and the controls, corrected per rival."""
    result: dict[str, dict[str, Any]] = {arm: {"loss": statistics.fmean(each)} for arm, each in losses.items()}
    for rival in (*CONTROLS, "none"):
        others = [arm for arm in losses if arm != rival]
        for arm in others:
            result[arm][f"over_{rival}"] = paired(losses[rival], losses[arm])
        holm([result[arm][f"over_{rival}"] for arm in others])
        for arm in others:
            result[arm][f"over_{rival}"]["verdict"] = verdict(result[arm][f"over_{rival}"])
    return result


def choose(spent: Mapping[str, Any], quality: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the rule of this file's head to the figures by model; every step with what it left."""

    def worse(reading: str) -> bool:
        verdicts = [arms[reading].get(f"over_{rival}", {}).get("verdict", "")
                    for arms in quality.values() if reading in arms for rival in ("none", "uniform")]  # fmt: skip
        return any(each.startswith("worse") for each in verdicts)

    def share(reading: str) -> float:
        return max(model[reading]["top_three"] for model in spent.values())

    def least(reading: str) -> float:
        kinds = [model[reading][kind]["scores"] for model in spent.values() for kind in ("halves", "data_sets")
                 if kind in model[reading]]  # fmt: skip
        return min(kinds)

    no_worse = [reading for reading in ELIGIBLE if not worse(reading)]
    spread = [reading for reading in no_worse if share(reading) <= min(map(share, no_worse)) + 0.05]
    return {
        "no_worse_in_loss": no_worse,
        "largest_top_three": {reading: round(share(reading), 4) for reading in no_worse},
        "spread": spread,
        "least_agreement": {reading: round(least(reading), 4) for reading in spread},
        "chosen": max(spread, key=least),
    }


def trained(
    ledger: short_runs.Ledger, model: nn.Module, rows: tuple[list[short_runs.Row], ...], arms: Sequence[str],
    planned: Callable[[str, int], dict[str, int]], settings: Mapping[str, Any], course: dict[str, Any],
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """All runs of a model; arms take turns, so that what is there after a cut can be compared."""
    runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for seed in range(course.pop("seeds")):
        for arm in arms:
            ranks, how = planned(arm, seed), {**course, "seed": seed}
            key = {**settings, **how, "arm": arm, "ranks": list(ranks.values())}
            run = ledger.result(key, lambda: short_runs.train_lora(model, ranks, *rows, **how))  # noqa: B023
            runs[arm].append(run)
            print(f"{settings['model']:<14} {arm:<14} seed {seed}  held-out loss {run['loss']:.4f}", flush=True)
    return runs


def told(name: str, rows: Mapping[str, Any]) -> None:
    for reading, row in rows.items():
        others = f"  data sets {row['data_sets']['scores']:.3f}" if "data_sets" in row else ""
        words = (f"top three {row['top_three']:.1%} of the score, {row['top_three_spent']:.1%} of the parameters",
                 f"at cap {row['at_cap']}, at rank 1 {row['at_floor']}", f"median {row['median_rank']:g}",
                 f"entropy {row['entropy']:.3f}", f"halves {row['halves']['scores']:.3f}{others}")  # fmt: skip
        print(f"{name:<14} {reading:<14} {'; '.join(words)}", flush=True)


def one_model(arguments: argparse.Namespace, keep: Path, name: str, checkpoint: str | Path,
              rows: short_runs.Pairs) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    model, tokenizer = short_runs.load(checkpoint)
    shapes = [ModuleShape(n, m.in_features, m.out_features) for n, m in find_targets(model, "all-linear").items()]
    print(f"{name}: {len(shapes)} modules; calibrating on {arguments.samples} rows", flush=True)
    file = keep / f"moments-{name}-{rows.name}-{arguments.samples}.safetensors"
    moments = moments_of(model, rows.calibration(tokenizer, arguments.samples), file)
    spent = figures(moments, shapes, arguments.rank)
    told(name, spent)
    if name not in arguments.train:
        return spent, {}
    course = {key: getattr(arguments, key) for key in ("seeds", "steps", "batch_size", "rate", "tokens")}
    course |= SMALL_COURSE if name == "small" else {}
    tokens = course.pop("tokens")
    short = rows.short(tokenizer, tokens, arguments.held_out)
    settings = {"model": name, "data": rows.name, "tokens": tokens, "train_rows": len(short[0]),
                "held_out": len(short[1])}  # fmt: skip
    ledger = short_runs.Ledger(keep / "ledger.jsonl")
    before = ledger.result(settings, lambda: short_runs.held_out_loss(model, short[1], 2 * arguments.batch_size))
    print(f"{name}: held-out loss {before:.4f} before training", flush=True)
    arm_ranks = functools.partial(planned, moments, shapes, arguments.rank)
    runs = trained(ledger, model, short, arguments.arms, arm_ranks, settings, dict(course))
    losses = {arm: [run["loss"] for run in each] for arm, each in runs.items()}
    for arm, row in (arms := compared(losses)).items():
        words = [f"over {rival} {over['mean']:+.4f}: {over['verdict']}" for rival in (*CONTROLS, "none")
                 if (over := row.get(f"over_{rival}"))]  # fmt: skip
        print(f"{name:<14} {arm:<14} loss {row['loss']:.4f}  {'; '.join(words)}", flush=True)
    return spent, {**settings, **course, "before": before, "arms": arms, "runs": runs}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl and boolq/train.jsonl (default: word problems)")
    parser.add_argument("--models", default="small,SmolLM2-135M", help="these two, and NAME=CHECKPOINT for others")
    parser.add_argument("--train", default="small,SmolLM2-135M", help="names of the models to train; may be empty")
    parser.add_argument("--arms", default=",".join((*CONTROLS, *ELIGIBLE)), help="what to train with")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=112, help="longest row that is trained on")
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--pretraining-steps", type=int, default=300, help="of the small model")
    parser.add_argument("--keep", type=Path, help="folder for the small model and all results; what lies there is not "
                        "computed again (default: thrown away)")  # fmt: skip
    arguments = parser.parse_args()
    arguments.models = {name: path for name, _, path in (each.partition("=") for each in arguments.models.split(","))}
    arguments.train, arguments.arms = (value.split(",") for value in (arguments.train, arguments.arms))
    if unknown := [arm for arm in arguments.arms if arm not in (*CONTROLS, *READINGS)]:
        raise SystemExit(f"--arms: {', '.join(unknown)} is none of {', '.join((*CONTROLS, *READINGS))}")
    return arguments


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory() as scratch:
        keep = arguments.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        rows = short_runs.Pairs(arguments.data, Path(scratch))
        build = {
            "small": lambda: short_runs.pretrain_small(keep / "small", rows.questions(), arguments.pretraining_steps),
            "SmolLM2-135M": record.smollm2,
        }
        models = {name: path or build[name]() for name, path in arguments.models.items()}
        done = {name: one_model(arguments, keep, name, path, rows) for name, path in models.items()}
    spent = {name: figures for name, (figures, _) in done.items()}
    quality = {name: runs for name, (_, runs) in done.items() if runs}
    decision = choose(spent, {name: runs["arms"] for name, runs in quality.items()})
    print(f"by the rule: {decision}")
    written = record.write_result("sensitivity_transforms", {
        "data": rows.name, "models": list(models), "rank": arguments.rank, "calibration_rows": arguments.samples,
        "spending": spent, "quality": quality, "rule": decision,
    })  # fmt: skip
    print(f"written to {written}")


if __name__ == "__main__":
    main()
