"""A saved adapter, in a model whose parameters FSDP2 has spread over processes."""

from pathlib import Path

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llamafactory_adaptive.adapter.lora import ADAPTER_WEIGHTS, peft_models


def restore_sharded(model: nn.Module, folder: Path) -> None:
    """Copy a saved adapter into the rows that each process owns.

    The Trainer has loaded the checkpoint before, but wrongly: of an adapter under FSDP2 its checkpoint holds the rows
    of the first process alone, which every process then loads (transformers 5.5.4 with accelerate 1.11.0).

    Args:
        model: the wrapped model; nothing is done where no parameter is spread.
        folder: checkpoint with the whole adapter, which every process can read.
    """
    spread = next((p for p in model.parameters() if p.requires_grad and isinstance(p, DTensor)), None)
    if not isinstance(spread, DTensor):
        return
    whole = load_file(folder / ADAPTER_WEIGHTS)
    rows = {name: distribute_tensor(tensor.to(spread.device_mesh.device_type), spread.device_mesh, spread.placements,
                                    src_data_rank=None) for name, tensor in whole.items()}  # fmt: skip
    for peft_model in peft_models(model):
        set_peft_model_state_dict(peft_model, rows)
