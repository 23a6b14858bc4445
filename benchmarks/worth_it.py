"""Does it pay? ``llamafactory-adaptive compare`` on SmolLM2-135M, in a regime that has a name.

Run: ``python benchmarks/worth_it.py [REGIME] [--data FOLDER] [--arms ...] [--rates ...] [--seeds 3] [--steps N]
[--rank N] [--eval-python PYTHON] [--keep FOLDER] [--go-on] [--record] [-- arguments of compare]``.

  data_limited      a few hundred short rows of GSM8K, each seen once at most, rank 8
  capacity_limited  rank 1 (``--rank 2``), no module must have an adapter, more, longer rows of GSM8K, each seen once
  boolq, arc        BoolQ; ARC-Easy and ARC-Challenge together; rank 8. Answers are those that the harness parses

This script writes rows and YAML, and calls the command, which does all else (docs/comparing.md): one budget, the best
rate of each arm chosen on one half of the held-out rows, other seeds and the other half for the verdict. What follows
``--`` is handed on to it, e.g. ``-- --devices 0,1``. With ``--keep`` the same command goes on after an end. Rows come
from ``--data``, or are generated. ``--record`` puts the result and its ledger into ``benchmarks/results``, in place of
what is recorded there; ``benchmarks/report.py`` makes pages of it. ``--put-away`` trains nothing: it adds what
``--keep`` holds so far to ``benchmarks/results/NAME.unfinished.jsonl``, and the same command on another machine goes
on from it with ``--go-on``. Without ``--go-on`` no run of these files is taken.

With ``--eval-python .venv-eval/bin/python``, which ``make eval-install`` makes, the adapters also answer the questions
in ``--data`` (``TASK/dev.jsonl``) in vLLM, in the words they were trained on; ``-- --eval-limit 400`` takes the first.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record
import shipped
import torch
import unfinished
import worth_it_rows as rows
import yaml

from llamafactory_adaptive.comparison.pages import JSON_FILE


@dataclass(frozen=True)
class Regime:
    """What is trained on, and for how long.

    Attributes:
        names: data sets.
        tokens: rows that are longer are left out.
        rank: budget.
        held_out: rows of both halves that are held out.
        once: whether no row may come twice.
        more: further keys of the YAML.
    """

    names: tuple[str, ...]
    tokens: int
    rank: int
    steps: int
    batch_size: int
    held_out: int
    once: bool = False
    more: tuple[tuple[str, Any], ...] = ()


# With ranks of at least 1, a budget of rank 1 leaves nothing to be placed.
FROM_ZERO = (("adaptive_min_rank", 0),)
REGIMES = {
    "data_limited": Regime(("gsm8k",), 136, 8, 80, 4, 120, once=True),
    "capacity_limited": Regime(("gsm8k",), 160, 1, 100, 8, 480, once=True, more=FROM_ZERO),
    "boolq": Regime(("boolq",), 96, 8, 100, 4, 400),
    "arc": Regime(("arc_easy", "arc_challenge"), 160, 8, 100, 4, 400),
}
ARMS = ("lora", "random", "sensitivity", "igu", "adalora", "tsq_ranks", "svd", "by_type", "elalora")


def parts(regime: Regime, data: str | None, model: Path) -> tuple[dict[str, list[rows.Pair]], str]:
    """Divide the rows into those to train on and held-out ones; and tell what they are called."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = rows.source(data, Path(scratch), regime.names)
        short = rows.short(rows.pairs(folder, regime.names), model, regime.tokens)
    divided = {"held_out": short[: regime.held_out], "train": short[regime.held_out :]}
    seen = regime.steps * regime.batch_size
    left, half = len(divided["train"]), regime.held_out // 2
    if regime.once and left < seen:
        raise SystemExit(f"{left} rows are left to train on, and {seen} are seen in {regime.steps} steps; give fewer "
                         "--steps, or more --tokens")  # fmt: skip
    if not regime.once and left < half:
        raise SystemExit(f"{left} rows are left to train on, fewer than {half}, half of those that are held out; "
                         "give a lower --held-out, or more --tokens")  # fmt: skip
    return divided, name


def settings(regime: Regime, model: Path, folder: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "lora_rank": regime.rank, "lora_target": "all", "dataset": "train", "eval_dataset": "held_out",
        "dataset_dir": str(folder), "template": "smollm2", "cutoff_len": 512, "max_steps": regime.steps,
        "per_device_train_batch_size": regime.batch_size, "per_device_eval_batch_size": 32,
        "lr_scheduler_type": "linear", "warmup_steps": 0.1, "logging_steps": 10, "bf16": True,
        # Memory is no question at this size; recomputation costs half as much again and changes no bit.
        "disable_gradient_checkpointing": True,
        "use_cpu": not torch.accelerator.is_available(),
        # PyTorch's kernel for CPUs takes an eighth longer for a step of rows as short as these.
        **({} if torch.accelerator.is_available() else {"flash_attn": "disabled"}), **dict(regime.more),
    }  # fmt: skip


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("regime", nargs="?", choices=REGIMES, default="data_limited")
    parser.add_argument("--data", help="folder with gsm8k/train.jsonl and so on (default: generated rows)")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma separated; lora and random are always in")
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3,8e-3", help="rates of every arm's first grid")
    parser.add_argument("--seeds", default="3", help="seeds that judge")
    parser.add_argument("--eval-python", type=Path, help="Python of the environment with vLLM (default: no questions)")
    for key in ("steps", "rank", "batch-size", "tokens", "held-out"):
        parser.add_argument(f"--{key}", type=int, help="in place of the regime's")
    parser.add_argument("--keep", type=Path, help="folder of the comparison; what lies there is not run again")
    parser.add_argument("--record", action="store_true", help="put result and ledger into benchmarks/results")
    parser.add_argument("--put-away", action="store_true", help="put what --keep holds so far there, and end")
    parser.add_argument("--go-on", action="store_true", help="take the runs that were put away there for runs of this")
    words = [*sys.argv[1:], "--"]
    end = words.index("--")
    return parser.parse_args(words[:end]), words[end + 1 : -1]


def regime_of(options: argparse.Namespace) -> Regime:
    own = {key: value for key in ("steps", "rank", "batch_size", "tokens", "held_out")
           if (value := getattr(options, key)) is not None}  # fmt: skip
    return replace(REGIMES[options.regime], **own)


def name_of(regime: Regime, options: argparse.Namespace) -> str:
    """Give the name of the result, which another budget does not overwrite."""
    rank = "" if regime.rank == REGIMES[options.regime].rank else f"_rank{regime.rank}"
    return f"worth_it_{options.regime}{rank}"


def places(folder: Path) -> Mapping[str, Path]:
    """Give the paths in the settings of runs, by words that mean the same elsewhere."""
    return {"<folder>": folder, "<model>": record.smollm2()}


def words_for_tasks(regime: Regime, options: argparse.Namespace) -> list[str]:
    """Write what the adapters answer as arguments of the command; nothing without the environment that asks."""
    if options.eval_python is None:
        return []
    if (data := rows.given(options.data)) is None:
        raise SystemExit("--eval-python asks the questions of --data, which is missing")
    return ["--tasks", ",".join(regime.names), "--eval-python", str(options.eval_python), "--eval-data", data,
            "--eval-protocol", "llm_adapters", "--eval-args", "--template training"]  # fmt: skip


def compare(regime: Regime, options: argparse.Namespace, more: Sequence[str], folder: Path) -> str:
    """Write rows and YAML, and run the command; tell what the rows are called."""
    model = record.smollm2()
    if options.go_on:
        found = unfinished.bring_back(name_of(regime, options), folder, places(folder))
        print(f"going on from {found} lines that were put away", flush=True)
    divided, name = parts(regime, options.data, model)
    rows.write(divided, folder / "data")
    config = folder / "worth_it.yaml"
    config.write_text(yaml.safe_dump(settings(regime, model, folder / "data")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "llamafactory_adaptive.cli", "compare", str(config), "--out", str(folder),
         "--arms", options.arms, "--rates", options.rates, "--seeds", options.seeds,
         "--held-out", str(regime.held_out), *words_for_tasks(regime, options), *more], check=False,
    )  # fmt: skip
    if done.returncode not in (0, 1):  # 1: some arm could not be run, which the result tells
        raise SystemExit(done.returncode)
    return name


def main() -> None:
    options, more = parse()
    regime = regime_of(options)
    name = name_of(regime, options)
    if options.put_away:
        print(f"{unfinished.put_away(name, options.keep and options.keep.resolve(), places)} lines are put away")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        data = compare(regime, options, more, folder)
        if not options.record or not (folder / JSON_FILE).is_file():  # a trial, or --dry-run
            return
        held, lines = shipped.from_folder(folder, record.smollm2().name)
    shipped.ledger_file(name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    written = record.write_result(name, {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "regime": options.regime, "data": data,
        "longest_row": regime.tokens, "rank": regime.rank, "steps": regime.steps, "batch_size": regime.batch_size,
        "device": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu", **held,
    })  # fmt: skip
    print(f"written to {written}")
    if (away := unfinished.unfinished_file(name)).is_file():
        print(f"{away} stays, for arms that may join; delete it where none will")


if __name__ == "__main__":
    main()
