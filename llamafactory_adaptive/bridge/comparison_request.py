"""From the arguments of ``compare`` to a comparison whose settings are checked, and words on what it will do."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from llamafactory_adaptive.bridge.arguments import check_config_file, command_line_settings, our_keys
from llamafactory_adaptive.bridge.comparison import Comparison
from llamafactory_adaptive.bridge.comparison_checks import cpu_threads, gpu_kinds, visible_devices
from llamafactory_adaptive.bridge.comparison_tasks import TaskEvaluations
from llamafactory_adaptive.comparison.arm_methods import keys_left_to_yaml
from llamafactory_adaptive.comparison.arms import choose_arms, keys_without_effect, with_lowest_ranks, without_twins
from llamafactory_adaptive.comparison.request import design_of, devices_in_words, devices_of
from llamafactory_adaptive.comparison.secrets import redacted
from llamafactory_adaptive.comparison.task_request import TaskRequest
from llamafactory_adaptive.config.arguments import AdaptiveArguments


def comparison_of(
    arguments: argparse.Namespace, say: Callable[[str], None]
) -> tuple[Comparison, Sequence[str | None]]:
    """Build the comparison that the arguments ask for, check it, tell what it will do; and return its devices, too.

    Raises:
        AdaptiveConfigError: an argument or a setting is wrong, or a run of some arm would be refused.
    """
    check_config_file(arguments.config)
    given = command_line_settings()
    assert isinstance(given, dict)
    if given.get("finetuning_type") == "adaptive":  # named, so that an arm of that method is known to be the YAML's
        given = {**given, "adaptive_method": given.get("adaptive_method") or AdaptiveArguments.adaptive_method}
    design = design_of(arguments, given.get("learning_rate"))
    gpus = gpu_kinds(given)
    devices = devices_of(arguments.devices, visible_devices(), gpus, cpu_threads())
    names = [name.strip() for name in arguments.arms.split(",") if name.strip()]
    own_keys = our_keys(given)
    chosen, raised = with_lowest_ranks(choose_arms(names, arguments.arm, given), given, own_keys)
    arms, twins = without_twins(chosen, given, own_keys)
    comparison = Comparison(given, arms, design, arguments.out, arguments.held_out, arguments.keep_adapters)
    comparison.check()
    for name, other in twins.items():
        say(f"the arm {name} is left out: its settings are those of {other}")
    if raised := {name: low for name, low in raised.items() if name not in twins}:
        bounds = ", ".join(f"{name} ({low})" for name, low in raised.items())
        say(f"arms whose adaptive_min_rank is higher than the YAML's, as their methods need: {bounds}")
    having = {key: [arm.name for arm in arms if comparison.settings_of(arm.name).get(key) == given[key]]
              for key in keys_left_to_yaml(given, own_keys)}  # fmt: skip
    if some := [f"{key} ({', '.join(names)})" for key, names in having.items() if names]:
        say(f"settings of the YAML that these arms alone have: {', '.join(some)}")
    if unused := [*keys_without_effect(given), *(key for key, names in having.items() if not names)]:
        say(f"settings of the YAML that no run of a comparison uses: {', '.join(unused)}")
    if taken := devices_in_words(arguments.devices, devices, len(gpus)):
        say(taken)
    say(f"{len(arms)} arms, {_runs(comparison)}: {', '.join(arm.name for arm in arms)}")
    return comparison, devices


def evaluations_of(
    comparison: Comparison,
    request: TaskRequest | None,
    devices: Sequence[str | None],
    say: Callable[[str], None],
) -> TaskEvaluations | None:
    """Build the evaluations of a comparison, checked in the harness's environment; None where no task is asked.

    Raises:
        EvaluationError: the harness could not make them.
    """
    if request is None:
        return None
    say(f"checking tasks, rows and vLLM in {request.python}, which takes a minute")
    evaluations = TaskEvaluations(comparison, request, devices[0])
    say(evaluations.words_before())
    return evaluations


def _runs(comparison: Comparison) -> str:
    """Describe the number of runs, and their steps where these do not depend on the number of rows."""
    design, asked = comparison.design, comparison.asked_steps()
    count = design.fewest_runs(len(comparison.arms))
    words = f"{count} runs, and up to {design.extensions} more for each arm whose best rate is an end of its grid"
    if asked is None:
        return f"{words}, of num_train_epochs each"
    return f"{words}, of {asked} steps" + (
        f" ({design.steps_for_rates} where a rate is chosen)" if design.steps_for_rates else ""
    )


def fixed_before(
    arguments: argparse.Namespace, comparison: Comparison, effect: float, request: TaskRequest | None
) -> dict[str, Any]:
    """Collect the arguments that a user should not change once results were seen.

    Args:
        arguments: parsed arguments.
        comparison: the comparison that they ask for.
        effect: smallest difference in loss that matters.
        request: what tasks are asked; None without ``--tasks``.
    """
    design = comparison.design
    by_design = {"seeds": design.seeds, "rate-seeds": design.rate_seeds, "steps": design.steps,
                 "steps-for-rates": design.steps_for_rates, "extensions": design.extensions}  # fmt: skip
    grid = {"rates": sorted(design.rates), "alphas": None if design.alphas == (None,) else list(design.alphas)}
    asked = {"tasks": arguments.tasks, "task-effect": request and request.effect, "eval-limit": arguments.eval_limit,
             "eval-protocol": request and request.protocol, "eval-data": request and request.data,
             "eval-args": arguments.eval_args and redacted(shlex.split(arguments.eval_args))}  # fmt: skip
    return {
        **asked,
        "effect": effect,
        **by_design,
        "held-out": arguments.held_out,
        "arms": list(comparison.arms),
        **grid,
    }
