"""``llamafactory-adaptive plan``: the ranks a run would train, without training."""

import argparse
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.options import coerce
from llamafactory_adaptive.reports.plaintext import tell


if TYPE_CHECKING:
    from llamafactory_adaptive.bridge.checked_run import CheckedRun
    from llamafactory_adaptive.config.run_config import AdaptiveConfig
    from llamafactory_adaptive.ranks.plan import RankPlan


def plan(arguments: argparse.Namespace) -> int:
    """Compute ranks without training: print their table, write heat-map and ``adaptive_rank_plan.json``."""
    require_enabled()
    tell(f"planning the ranks of {arguments.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS
    from llamafactory_adaptive.bridge.arguments import asks_for_adaptive, check_config_file, command_line_settings
    from llamafactory_adaptive.bridge.checked_run import checked_run
    from llamafactory_adaptive.bridge.host_check import check_folder, check_host_settings
    from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
    from llamafactory_adaptive.bridge.seams import require_seams
    from llamafactory_adaptive.files import PLAN_FILE
    from llamafactory_adaptive.folder_lock import locked
    from llamafactory_adaptive.planning.sources import advice, fresh_plan
    from llamafactory_adaptive.planning.start_message import start_message
    from llamafactory_adaptive.reports.plots import HEATMAP_FILE, save_heatmap
    from llamafactory_adaptive.reports.tables import rank_table

    require_seams()
    check_config_file(arguments.config)
    sys.argv = ["llamafactory-adaptive", str(arguments.config), *arguments.overrides]
    given = command_line_settings()
    if not asks_for_adaptive(given):
        kind = given.get("finetuning_type", "lora") if isinstance(given, dict) else "lora"
        refuse("finetuning_type", kind, "there are no ranks to plan", "finetuning_type: adaptive")
    run = checked_run(given, host_too=False)
    check_host_settings(run.args)
    config = run.config
    tell(start_message(config))
    if config.search is not None:
        if arguments.peft is not None:
            refuse("--peft", str(arguments.peft), "these ranks are found during training", "leaving it out")
        return _plan_of_a_dynamic_run(run)
    started = time.perf_counter()
    folder = arguments.out or Path(run.args["output_dir"])
    if arguments.out is None and (folder / ADAPTER_WEIGHTS).is_file():
        refuse("output_dir", str(folder), "it holds a trained adapter with its plan", "--out <another folder>")
    check_folder("output_dir" if arguments.out is None else "--out", folder)
    if arguments.peft is not None:
        _check_peft_folder(arguments.peft)
    with locked(folder):
        plan = fresh_plan(config, LlamaFactoryRun(run)).plan
        plan.save(folder / PLAN_FILE)
        save_heatmap(plan, folder / HEATMAP_FILE)
    print(rank_table(plan))
    for line in _about_the_rate(run.args, plan, config) if config.given is not None else []:
        print(line)
    for line in advice(plan, config):
        print(f"warning: {line}")
    if arguments.peft is not None:
        _write_peft_config(plan, run.args, arguments.peft)
    print(f"plan and heat-map written to {folder} in {time.perf_counter() - started:.1f} s; nothing was trained")
    return 0


def _check_peft_folder(folder: Path) -> None:
    """Refuse a folder that holds an adapter's configuration, or that cannot be written."""
    from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG
    from llamafactory_adaptive.bridge.host_check import check_folder

    if (folder / ADAPTER_CONFIG).exists():
        refuse("--peft", str(folder), f"it holds an {ADAPTER_CONFIG}", "--peft <another folder>")
    check_folder("--peft", folder)


def _write_peft_config(plan: "RankPlan", args: Mapping[str, Any], folder: Path) -> None:
    """Write PEFT's configuration of the plan, with the run's dropout and base model."""
    from llamafactory_adaptive.api.adapters import lora_config

    base, dropout = str(args["model_name_or_path"]), float(args.get("lora_dropout") or 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    lora_config(plan, base_model_name_or_path=base, lora_dropout=dropout).save_pretrained(str(folder))
    print(f"adapter_config.json for PEFT written to {folder}")


def _plan_of_a_dynamic_run(run: "CheckedRun") -> int:
    """Print the start of a dynamic run and its budget over the steps, without training; return the exit code."""
    from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
    from llamafactory_adaptive.bridge.target_shapes import epochs, estimated_epoch_steps, estimated_steps
    from llamafactory_adaptive.planning.sources import fresh_plan
    from llamafactory_adaptive.ranks.schedule import Exchanges, Schedule, SingleCut, make_schedule, short_run_warning
    from llamafactory_adaptive.reports.tables import schedule_table, totals

    args, config = run.args, run.config
    assert config.search is not None
    start = fresh_plan(config, LlamaFactoryRun(run)).plan
    budget, kind = start.budget(), start.budget_kind
    try:
        steps = int(coerce(args.get("max_steps") or -1, int))
    except ValueError as error:
        refuse("max_steps", args["max_steps"], "must be a whole number", "max_steps: 100", cause=error)
    estimate = None if steps > 0 else estimated_steps(args)
    shown = steps if steps > 0 else estimate or 100
    epoch = estimated_epoch_steps(args)
    assumed = epoch or max(1, round(shown / epochs(args)))  # without rows to count the shown steps are all epochs
    schedule = make_schedule(config.search, shown, budget[f"used_{kind}"], budget[f"asked_{kind}"], assumed)
    if isinstance(schedule, Schedule):
        print(schedule_table(start, schedule, shown))
    else:
        change = "The adapter is cut" if isinstance(schedule, SingleCut) else "Ranks move about"
        print(f"{change} during training ({start.method}): {schedule.describe(kind)} of {shown}")
    if estimate:
        print(f"about {estimate:,} steps, estimated from num_train_epochs and the rows of the data set")
    elif steps <= 0:
        print("the number of steps follows from the data: the table stands for 100 of them")
    if isinstance(schedule, Schedule | Exchanges) and schedule.interval_epochs is not None and epoch is None:
        print(f"the steps of an epoch follow from the data: {assumed:,} are taken here")
    if (steps > 0 or estimate) and (warning := short_run_warning(schedule, shown)):
        print(f"warning: {warning}")
    for line in _about_the_rate(args, start, config):
        print(line)
    print("live tensors:", *totals(start), sep="\n")
    print("ranks are found during training; nothing was written")
    return 0


def _about_the_rate(args: Mapping[str, Any], start: "RankPlan", config: "AdaptiveConfig") -> list[str]:
    """Describe the learning rate against that of plain LoRA, where the method's adapter starts slower."""
    from llamafactory_adaptive.methods import make_method
    from llamafactory_adaptive.reports.learning_rate import TRAINERS_RATE, rate_advice
    from llamafactory_adaptive.training.masked_search import SearchRequest

    slowdown = SearchRequest(start, config, make_method(config.method, config.options)).slowdown
    given = args.get("learning_rate")
    rate = float(coerce(TRAINERS_RATE if given is None else given, float))
    optimizer, one_rate = str(args.get("optim") or "adamw_torch"), args.get("loraplus_lr_ratio") is None
    words, warning = rate_advice(rate, slowdown, optimizer, one_rate)
    return [*([words] if words else []), *([f"warning: {warning}"] if warning else [])]
