"""Where a parameter and its gradient live, by training engine. The only file that imports DeepSpeed."""

from torch import nn


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also while ZeRO-3 holds it in partitions."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def init_deepspeed_on_cpu() -> None:
    """Open DeepSpeed's process group before the model loads.

    Without it ``zero.Init`` of ZeRO-3 computes its batch size against a world of one process on CPU and asserts.
    Only called where there is no accelerator; elsewhere the Trainer does this in time.
    """
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
