"""PEFT adapters made from plans, and the check of saved adapters."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llamafactory_adaptive.adapter.lora import (
    PlannedLoraConfig,
    keep_4bit_unpacked_on_cpu,
    lora_config_arguments,
    name_targets_in_full,
)
from llamafactory_adaptive.adapter.name_lookup import look_names_up_once
from llamafactory_adaptive.adapter.verify import check_live, check_saved
from llamafactory_adaptive.errors import Problem, refuse, refuse_all
from llamafactory_adaptive.ranks.plan import RankPlan, load_plan


def lora_config(plan: RankPlan | str | Path, task_type: str = "CAUSAL_LM", **settings: Any) -> LoraConfig:
    """Make the PEFT configuration of a plan, for trainers that attach the adapter themselves.

    What is saved names every module in full, also where PEFT shortens the list while it trains (20 targets or more).

    Args:
        plan: plan from :func:`plan_ranks`, or the path of a saved one.
        task_type: PEFT's name of the model's task.
        **settings: further arguments of ``peft.LoraConfig``, such as ``lora_dropout=0.05`` or ``bias="none"``; those
            that the plan decides (``r``, ``lora_alpha``, ``target_modules``, the patterns) cannot be given.

    Returns:
        A ``peft.LoraConfig``, as in ``SFTTrainer(..., peft_config=lora_config(plan))``.

    Raises:
        AdaptiveConfigError: PEFT has no such setting, or the plan decides it.
        PlanError: there is no valid plan at the path.
    """
    look_names_up_once()
    decided = lora_config_arguments(_read(plan))
    known = {field.name for field in dataclasses.fields(LoraConfig) if field.init}
    refuse_all(*(_wrong_setting(key, value, decided, known) for key, value in settings.items()
             if key in decided or key not in known))  # fmt: skip
    return PlannedLoraConfig(task_type=task_type, **decided, **settings)


def _wrong_setting(key: str, value: Any, decided: dict[str, Any], known: set[str]) -> Problem:
    if key in decided:
        return Problem(key, value, "the plan decides it", "plan_ranks with another lora_rank or lora_alpha")
    near = difflib.get_close_matches(key, known, n=1)
    return Problem(key, value, "peft.LoraConfig has no such argument", f"{near[0]}=..." if near else "leaving it out")


def attach_adapter(
    model: nn.Module, plan: RankPlan | str | Path, task_type: str = "CAUSAL_LM", **settings: Any
) -> PeftModel:
    """Attach the plan's LoRA adapter to a model, and check that every module got its rank.

    Args:
        model: the base model that was scored; its target modules are replaced in place, as PEFT does.
        plan: plan from :func:`plan_ranks`, or the path of a saved one.
        task_type: PEFT's name of the model's task.
        **settings: further arguments of ``peft.LoraConfig``, as in :func:`lora_config`.

    Returns:
        A ``peft.PeftModel`` for any trainer; ``save_pretrained`` writes a plain LoRA adapter.

    Raises:
        AdaptiveConfigError: PEFT has no such setting, or the plan decides it.
        GuardError: the adapter does not match the plan, for example because the model is another one.
    """
    plan = _read(plan)
    config = lora_config(plan, task_type, **settings)
    keep_4bit_unpacked_on_cpu(model)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:  # none of the plan's modules is there
        reason = f"the plan does not fit it ({str(error).splitlines()[0][:200]})"
        refuse("model", type(model).__name__, reason, "the base model that was scored")
    name_targets_in_full(adapted, plan)
    check_live(adapted, plan)
    return adapted


def check_adapter(folder: str | Path, plan: RankPlan | str | Path) -> int:
    """Check a saved adapter against its plan, from the files alone: names, ranks, shapes, scale, finite values.

    Args:
        folder: folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        plan: plan from :func:`plan_ranks`, or the path of a saved one.

    Returns:
        The number of modules whose B factor is still zero, that is, which no gradient reached; 0 after training.

    Raises:
        GuardError: the adapter does not match; the message names the first differences.
    """
    return check_saved(Path(folder), _read(plan))


def _read(plan: RankPlan | str | Path) -> RankPlan:
    return plan if isinstance(plan, RankPlan) else load_plan(Path(plan))
