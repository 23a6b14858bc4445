"""The check that a Trainer's optimizer, whoever made it, can train the components of a rank search."""

from typing import Any

from llamafactory_adaptive.config.search_conflicts import state_changes
from llamafactory_adaptive.engines.optimizer_state import keeps_known_states, unwrapped
from llamafactory_adaptive.errors import refuse
from llamafactory_adaptive.training.masked_search import MaskedSearch


def check_optimizer(optimizer: Any, search: MaskedSearch) -> None:
    """Refuse an optimizer that does not train the whole adapter, or whose states cannot be set anew.

    The search adds parameters when the Trainer is built, which an optimizer made before (``optimizers=...``) lacks.

    Args:
        optimizer: optimizer of a Trainer without DeepSpeed, before the first step.
        search: the live adapter, and how its ranks change.

    Raises:
        AdaptiveConfigError: parameters of the adapter are missing, or states that the search changes are not known.
    """
    optimizer = unwrapped(optimizer)
    name = type(optimizer).__name__
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    needed = [parameter for module in search.triplets.modules for parameter in module.parameters().values()]
    missing = sum(id(parameter) not in trained for parameter in needed)
    if missing:
        reason = (
            f"it does not train {missing} of the adapter's {len(needed)} parameters: some are made with the Trainer, "
            "whose optimizer must be made after that"
        )
        refuse("optimizers", name, reason, "optimizer_cls_and_kwargs=(torch.optim.AdamW, {'lr': 1e-4})")
    change = state_changes(search.request.method) if search.request.config.search is not None else None
    if change is not None and not keeps_known_states(optimizer):
        cause, remedy = change
        reason = f"{cause}, and where this optimizer keeps them is not known"
        refuse("optim", name, reason, f"optim: adamw_torch, or {remedy}")
