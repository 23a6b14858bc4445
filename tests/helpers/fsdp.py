"""FSDP between two CPU processes: accelerate shards on accelerators alone, though torch does on CPUs too."""

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch.distributed.fsdp import _optim_utils
from torch.distributed.fsdp._flat_param import FlatParamHandle


# What `accelerate launch` with LLaMA-Factory's fsdp2_config.yaml puts into the environment of a process.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
# What is set for FSDP 1, less the loading by one process alone, which needs accelerators.
FSDP1 = {
    **{name: value for name, value in FSDP2.items() if name != "FSDP_RESHARD_AFTER_FORWARD"},
    "FSDP_VERSION": "1",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def shard_on_cpu() -> None:
    """Make accelerate do on CPUs what it does on GPUs where the environment asks for FSDP."""
    from accelerate import state

    original = state.AcceleratorState.__init__

    @wraps(original)
    def make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = state.DistributedType.FSDP
            self.device = torch.device("cpu")  # without the number that FSDP 1 compares

    state.AcceleratorState.__init__ = make
    # What is moved from CPU to CPU would be freed while it is still needed.
    FlatParamHandle.to_cpu = lambda self: nullcontext()  # type: ignore[method-assign, assignment, misc]
    unflatten = _optim_utils._unflatten_orig_param_states

    @wraps(unflatten)
    def unflatten_copies(info: Any, states: dict[str, dict[str, Any]], kind: str, *rest: Any) -> None:
        unflatten(info, states, kind, *rest)
        # Every kind of optimizer state is gathered into one buffer, which the move to the CPU copies; from there it
        # would not, and the first running mean would be saved as the second.
        states.update({name: {**kinds, kind: kinds[kind].clone()} for name, kinds in states.items() if kind in kinds})

    _optim_utils._unflatten_orig_param_states = unflatten_copies
