"""``llamafactory-adaptive plan``: the ranks a run would train, without training."""

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from llamafactory_adaptive.cli.host import require_enabled
from llamafactory_adaptive.cli.json_output import kept_for_json, print_json
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.options import coerce
from llamafactory_adaptive.reports.plaintext import tell


if TYPE_CHECKING:
    from llamafactory_adaptive.bridge.checked_run import CheckedRun
    from llamafactory_adaptive.config.run_config import AdaptiveConfig
    from llamafactory_adaptive.ranks.plan import RankPlan
    from llamafactory_adaptive.ranks.schedule import AnySchedule


@dataclass
class _Outcome:
    """What a plan came to: lines for a person, and facts for ``--json``."""

    plan: "RankPlan"
    lines: list[str]
    warnings: list[str]
    written: list[Path]
    facts: dict[str, Any]

    def document(self, seconds: float) -> dict[str, Any]:
        """Build the JSON document, whose keys are described in ``docs/reports.md``."""
        written = [str(path) for path in self.written]
        common = {"schema_version": 1, "seconds": round(seconds, 2), "written": written, "warnings": self.warnings}
        return {**common, **self.facts, "plan": self.plan.to_json()}


def plan(arguments: argparse.Namespace) -> int:
    """Compute ranks without training: print their table, write heat-map and ``adaptive_rank_plan.json``."""
    from llamafactory_adaptive.reports.terminal import print_plan

    require_enabled()
    started = time.perf_counter()
    tell(f"planning the ranks of {arguments.config}; LLaMA-Factory starts first, which takes 10 to 30 seconds")
    with kept_for_json(arguments.json):
        outcome = _planned(arguments)
    seconds = time.perf_counter() - started
    if arguments.json:
        print_json(outcome.document(seconds))
        return 0
    if outcome.written:
        print_plan(outcome.plan)
    warnings = (f"warning: {line}" for line in outcome.warnings)
    print(*outcome.lines, *warnings, *_summary(arguments, outcome, seconds), sep="\n")
    return 0


def _summary(arguments: argparse.Namespace, outcome: _Outcome, seconds: float) -> list[str]:
    """Tell what was done, what it cost, and what to do next."""
    words = " ".join(map(quote, [str(arguments.config), *arguments.overrides]))
    following = f"next: llamafactory-cli train {words}"
    if not outcome.written:
        return ["ranks are found during training; nothing was written", following]
    first, *_ = outcome.written
    if outcome.facts["origin"] == "continued":
        hint = "these ranks are those of adapter_name_or_path, and stay"
    else:
        measured = outcome.facts["origin"] != "given" and "statistics_reused" in outcome.plan.provenance
        reused = "scores are re-used; " if measured else ""
        hint = f"{reused}for ranks that you edit, add adaptive_plan={quote(str(first))}"
    return [
        f"plan and heat-map written to {first.parent} in {seconds:.1f} s; nothing was trained",
        f"{following}  ({hint})",
    ]


def _planned(arguments: argparse.Namespace) -> _Outcome:
    """Check the settings, and plan the run that they describe."""
    from llamafactory_adaptive.bridge.arguments import (
        adapter_to_go_on_with,
        asks_for_adaptive,
        check_config_file,
        command_line_settings,
    )
    from llamafactory_adaptive.bridge.checked_run import checked_run
    from llamafactory_adaptive.bridge.host_check import check_host_settings
    from llamafactory_adaptive.bridge.seams import require_seams
    from llamafactory_adaptive.planning.start_message import start_message

    require_seams()
    check_config_file(arguments.config)
    sys.argv = ["llamafactory-adaptive", str(arguments.config), *arguments.overrides]
    given = command_line_settings()
    if not asks_for_adaptive(given):
        kind = given.get("finetuning_type", "lora") if isinstance(given, dict) else "lora"
        refuse("finetuning_type", kind, "there are no ranks to plan", "finetuning_type: adaptive")
    run = checked_run(given, host_too=False)
    check_host_settings(run.args)
    tell(start_message(run.config, adapter_to_go_on_with(run.args)))
    if run.config.search is None:
        return _plan_of_a_static_run(run, arguments)
    if arguments.peft is not None:
        refuse("--peft", str(arguments.peft), "these ranks are found during training", "leaving it out")
    return _plan_of_a_dynamic_run(run)


def _plan_of_a_static_run(run: "CheckedRun", arguments: argparse.Namespace) -> _Outcome:
    """Score the modules, and write plan and heat-map."""
    from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS
    from llamafactory_adaptive.bridge.host_check import check_folder
    from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
    from llamafactory_adaptive.files import PLAN_FILE
    from llamafactory_adaptive.folder_lock import locked
    from llamafactory_adaptive.planning.sources import advice, plan_of_new_run
    from llamafactory_adaptive.reports.plots import HEATMAP_FILE, save_heatmap

    folder, config = arguments.out or Path(run.args["output_dir"]), run.config
    if arguments.out is None and (folder / ADAPTER_WEIGHTS).is_file():
        refuse("output_dir", str(folder), "it holds a trained adapter with its plan", "--out <another folder>")
    check_folder("output_dir" if arguments.out is None else "--out", folder)
    if arguments.peft is not None:
        _check_peft_folder(arguments.peft)
    with locked(folder):
        source = plan_of_new_run(config, LlamaFactoryRun(run))
        plan = source.plan
        plan.save(folder / PLAN_FILE)
        save_heatmap(plan, folder / HEATMAP_FILE)
    lines, warnings = _about_the_rate(run.args, plan, config) if config.given is not None else ([], [])
    outcome = _Outcome(plan, lines, [*warnings, *advice(plan, config)], [folder / PLAN_FILE, folder / HEATMAP_FILE],
                       {"found": "before training", "origin": source.origin})  # fmt: skip
    if arguments.peft is not None:
        outcome.written.append(_write_peft_config(plan, run.args, arguments.peft))
        outcome.lines.append(f"adapter_config.json for PEFT written to {arguments.peft}")
    return outcome


def _check_peft_folder(folder: Path) -> None:
    """Refuse a folder that holds an adapter's configuration, or that cannot be written."""
    from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG
    from llamafactory_adaptive.bridge.host_check import check_folder

    if (folder / ADAPTER_CONFIG).exists():
        refuse("--peft", str(folder), f"it holds an {ADAPTER_CONFIG}", "--peft <another folder>")
    check_folder("--peft", folder)


def _write_peft_config(plan: "RankPlan", args: Mapping[str, Any], folder: Path) -> Path:
    """Write PEFT's configuration of the plan, with the run's dropout and base model, and return its path."""
    from llamafactory_adaptive.adapter.lora import ADAPTER_CONFIG
    from llamafactory_adaptive.api.adapters import lora_config

    base, dropout = str(args["model_name_or_path"]), float(args.get("lora_dropout") or 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    lora_config(plan, base_model_name_or_path=base, lora_dropout=dropout).save_pretrained(str(folder))
    return folder / ADAPTER_CONFIG


def _plan_of_a_dynamic_run(run: "CheckedRun") -> _Outcome:
    """Describe the start of a dynamic run and its budget over the steps, without training; write nothing."""
    from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
    from llamafactory_adaptive.planning.sources import fresh_plan
    from llamafactory_adaptive.ranks.schedule import Schedule, SingleCut, short_run_warning
    from llamafactory_adaptive.reports.tables import schedule_table, totals

    start = fresh_plan(run.config, LlamaFactoryRun(run)).plan
    length = _length_of(run, start)
    schedule, steps, kind = length.schedule, length.steps, start.budget_kind
    if isinstance(schedule, Schedule):
        lines = [schedule_table(start, schedule, steps)]
    else:
        change = "The adapter is cut" if isinstance(schedule, SingleCut) else "Ranks move about"
        lines = [f"{change} during training ({start.method}): {schedule.describe(kind)} of {steps}"]
    warnings = [warning] if length.known and (warning := short_run_warning(schedule, steps)) else []
    described, more = _about_the_rate(run.args, start, run.config)
    lines += [*length.notes, *described, "live tensors:", *totals(start)]
    facts = {"found": "during training", "steps": steps, "steps_known": length.known,
             "schedule": schedule.describe(kind)}  # fmt: skip
    return _Outcome(start, lines, [*warnings, *more], [], facts)


@dataclass(frozen=True)
class _Length:
    """How long a dynamic run is, as far as that is known before it: its schedule, steps, and notes on both."""

    schedule: "AnySchedule"
    steps: int
    known: bool
    notes: list[str]


def _length_of(run: "CheckedRun", start: "RankPlan") -> _Length:
    """Build the schedule of a run over its steps; where these follow from the data, over those estimated or 100."""
    from llamafactory_adaptive.bridge.target_shapes import epochs, estimated_epoch_steps, estimated_steps
    from llamafactory_adaptive.ranks.schedule import Exchanges, Schedule, make_schedule

    args, budget, kind = run.args, start.budget(), start.budget_kind
    assert run.config.search is not None
    try:
        steps = int(coerce(args.get("max_steps") or -1, int))
    except ValueError as error:
        refuse("max_steps", args["max_steps"], "must be a whole number", "max_steps: 100", cause=error)
    estimate = None if steps > 0 else estimated_steps(args)
    shown = steps if steps > 0 else estimate or 100
    epoch = estimated_epoch_steps(args)
    assumed = epoch or max(1, round(shown / epochs(args)))  # without rows to count the shown steps are all epochs
    schedule = make_schedule(run.config.search, shown, budget[f"used_{kind}"], budget[f"asked_{kind}"], assumed)
    notes = []
    if estimate:
        notes.append(f"about {estimate:,} steps, estimated from num_train_epochs and the rows of the data set")
    elif steps <= 0:
        notes.append("the number of steps follows from the data: the table stands for 100 of them")
    if isinstance(schedule, Schedule | Exchanges) and schedule.interval_epochs is not None and epoch is None:
        notes.append(f"the steps of an epoch follow from the data: {assumed:,} are taken here")
    return _Length(schedule, shown, steps > 0 or bool(estimate), notes)


def _about_the_rate(
    args: Mapping[str, Any], start: "RankPlan", config: "AdaptiveConfig"
) -> tuple[list[str], list[str]]:
    """Describe the learning rate against that of plain LoRA, where the method's adapter starts slower, and warn."""
    from llamafactory_adaptive.methods import make_method
    from llamafactory_adaptive.reports.learning_rate import TRAINERS_RATE, rate_advice
    from llamafactory_adaptive.training.masked_search import SearchRequest

    slowdown = SearchRequest(start, config, make_method(config.method, config.options)).slowdown
    given = args.get("learning_rate")
    rate = float(coerce(TRAINERS_RATE if given is None else given, float))
    optimizer, one_rate = str(args.get("optim") or "adamw_torch"), args.get("loraplus_lr_ratio") is None
    words, warning = rate_advice(rate, slowdown, optimizer, one_rate)
    return [words] if words else [], [warning] if warning else []
