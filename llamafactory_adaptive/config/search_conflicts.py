"""Keys of LLaMA-Factory that cannot go with a search for ranks, or with triplets on given ranks, and why.

Pure standard library, on the flat mapping of a run's settings.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamafactory_adaptive.config.deepspeed_settings import read_section
from llamafactory_adaptive.config.fsdp_settings import fsdp_version
from llamafactory_adaptive.config.host_conflicts import Conflict, deepspeed_stage, find_clashes, is_on
from llamafactory_adaptive.errors import Problem
from llamafactory_adaptive.launcher import launched_processes


def state_changes(method: Any) -> tuple[str, str] | None:
    """Tell why a search by a method resets or scales the optimizer's states of some weights, and what avoids that."""
    reallocates = method.traits.strategy == "reallocate"
    rules = [
        (reallocates, "components that come back need fresh optimizer states", "tsq_reallocation: false"),
        (method.traits.strategy == "exchange", "new components need fresh optimizer states",
         "adaptive_method: adalora"),
        (not reallocates and method.return_rule.resets_lambda, "components that come back with lambda zero need fresh "
         "optimizer states", "igu_returns: none"),
        (method.traits.spectral, "the rotation of the factors at the cut needs fresh optimizer states",
         "adaptive_method: adalora"),
        (method.shrinkage is not None and method.shrinkage.lasting, "mending the strength of the adapter for good "
         "scales optimizer states", "leaving igu_mend_strength out"),
    ]  # fmt: skip
    causes = [(cause, remedy) for applies, cause, remedy in rules if applies]
    return (" and ".join(cause for cause, _ in causes), " and ".join(last for _, last in causes)) if causes else None


def _optimizer_conflicts(method: Any) -> list[Conflict]:
    """List the optimizers that cannot go with a method, with its cause and the way out; none if states stay."""
    change = state_changes(method)
    if change is None:
        return []
    cause, remedy = change
    return [
        replace(rule, reason=f"{cause}, {rule.reason}", suggestion=f"{rule.suggestion}, or {remedy}")
        for rule in OPTIMIZER_CONFLICTS
    ]


def check_search_conflicts(flat: Mapping[str, Any], made: Any) -> list[Problem]:
    """Find upstream options that cannot go with a search for ranks by the method ``made``."""
    rules = [*MASKING_CONFLICTS, *_optimizer_conflicts(made)]
    probes = made.traits.probes
    problems = find_clashes([*rules, *(PROBING_CONFLICTS if probes else ())], flat)
    if flat.get("adaptive_max_overhead") is not None and not probes:
        reason = "only igu_importance: integrated makes extra passes that could be thinned out"
        problems.append(Problem("adaptive_max_overhead", flat["adaptive_max_overhead"], reason, "leaving it out"))
    return problems


def check_given_conflicts(flat: Mapping[str, Any]) -> list[Problem]:
    """Find upstream options that cannot go with training given ranks as ``P diag(lambda) Q``."""
    return find_clashes(GIVEN_CONFLICTS, flat)


def _has_several_processes(flat: Mapping[str, Any]) -> bool:
    """Tell whether a run is one of several processes, or of Ray's workers, of which none has been started yet."""
    return launched_processes() > 1 or str(flat.get("ray_num_workers") or 1) != "1"


MASKING_CONFLICTS = (
    Conflict(
        "deepspeed",
        lambda flat: (
            deepspeed_stage(flat) == 1
            and read_section(flat.get("deepspeed"), "data_types").get("grad_accum_dtype") == "fp32"
        ),
        "DeepSpeed's bf16 optimizer (ZeRO-1 with grad_accum_dtype fp32) keeps gradients where scores cannot read them",
        "ZeRO-2, or leaving data_types out",
    ),
    Conflict(
        "fsdp_version",
        lambda flat: fsdp_version(flat) == 1,
        "FSDP 1 packs factors into flat tensors, in which components cannot be told apart",
        "fsdp_version: 2 in accelerate's configuration (version: 2 in fsdp_config)",
    ),
    Conflict(
        "adapter_name_or_path",
        lambda flat: bool(flat.get("adapter_name_or_path")) and not flat.get("create_new_adapter"),
        "ranks are found on a new adapter, whose live tensors are larger than the old one's",
        "create_new_adapter: true",
    ),
    Conflict(
        "torch_compile",
        is_on("torch_compile"),
        "masks and path positions change between steps, which would compile the model again and again",
        "torch_compile: false",
    ),
    Conflict(
        "auto_find_batch_size",
        lambda flat: bool(flat.get("auto_find_batch_size")) and _has_several_processes(flat),
        "memory runs out in one process while the others wait for it",
        "auto_find_batch_size: false, or one process",
    ),
    Conflict(
        "auto_find_batch_size",
        lambda flat: (
            bool(flat.get("auto_find_batch_size")) and (bool(flat.get("deepspeed")) or fsdp_version(flat) > 0)
        ),
        "a search that begins anew with smaller batches would have to take DeepSpeed or FSDP off the model first",
        "auto_find_batch_size: false",
    ),
)
_GIVEN_REASONS = {
    "deepspeed": "this optimizer of DeepSpeed keeps gradients where those of a regulariser cannot be added",
    "fsdp_version": "FSDP 1 packs factors into flat tensors, to which a regulariser cannot be added",
    "adapter_name_or_path": "P diag(lambda) Q begins as a new adapter",
    "torch_compile": "the backward pass of P diag(lambda) Q is not compiled",
}
_PLAIN = " (or igu_second_stage: lora)"
GIVEN_CONFLICTS = tuple(
    replace(rule, reason=_GIVEN_REASONS.get(rule.key, rule.reason), suggestion=rule.suggestion + _PLAIN)
    for rule in MASKING_CONFLICTS
)
# Optimizers whose states are one number per weight, so that those of single components can be set.
# Not rmsprop_bnb: its squares lie where those of its siblings keep momenta.
_ELEMENTWISE_OPTIMIZERS = {
    "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "sgd", "adagrad", "rmsprop",
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
}  # fmt: skip
_OWN_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")
# Where a search resets or scales the optimizer's states of some weights; the reasons follow the method's cause.
OPTIMIZER_CONFLICTS = (
    Conflict(
        "optim",
        lambda flat: str(flat.get("optim") or "adamw_torch") not in _ELEMENTWISE_OPTIMIZERS,
        "and where this optimizer keeps them per weight is not known",
        "optim: adamw_torch",
    ),
    *(Conflict(key, is_on(key), "which a plain optimizer alone allows", f"{key}: false") for key in _OWN_OPTIMIZERS),
    Conflict(
        "deepspeed",
        lambda flat: bool(flat.get("deepspeed")) and deepspeed_stage(flat) == 0,
        "and without ZeRO DeepSpeed keeps them where they cannot be changed",
        "ZeRO-1, 2 or 3, or leaving deepspeed out",
    ),
)


PROBING_CONFLICTS = (
    Conflict(
        "fp16",
        is_on("fp16"),
        "extra passes are not loss-scaled, so their gradients would vanish",
        "bf16: true",
    ),
    Conflict(
        "stage",
        lambda flat: flat.get("stage", "sft") not in ("pt", "sft"),
        "extra passes need the loss that the model itself returns",
        "igu_importance: shrink",
    ),
    Conflict(
        "deepspeed",
        lambda flat: deepspeed_stage(flat) == 3,
        "extra passes need whole weights on every process, which ZeRO-3 does not hold",
        "igu_importance: shrink",
    ),
    Conflict(
        "fsdp",
        lambda flat: fsdp_version(flat) > 0,
        "extra passes need whole weights on every process, which FSDP does not hold",
        "igu_importance: shrink",
    ),
    *(
        Conflict(key, is_on(key), "extra passes use the model's own loss", "igu_importance: shrink")
        for key in ("use_dft_loss", "use_asft_loss", "use_eaft_loss", "label_smoothing_factor")
    ),
)
