"""Where a parameter and its gradient live, by training engine. The only file that imports DeepSpeed.

Plain and DDP processes hold whole parameters. Under ZeRO each process owns a piece of every flattened parameter (maybe
an empty one), in fp32 beside the working copy, and after the backward pass the averaged gradient of that piece.
Whoever needs the two asks a :class:`Engine` and works on pieces; nothing is gathered for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from llamafactory_adaptive.optimizers import empty, is_like, put


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


class Engine(Protocol):
    """Access to weights and gradients between backward pass and optimizer step, before clipping.

    Attributes:
        partitioned: whether a process owns pieces only, so that sums over elements must be added up over processes.
    """

    partitioned: bool

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Start and length of what this process owns of the flattened parameter."""

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The owned pieces, flat; under ZeRO the fp32 copies that the optimizer updates."""

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients of the owned pieces, flat, averaged over processes; zeros where none arrived."""

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Take back what :meth:`gradients` gave, after it was edited in place."""

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor) -> None:
        """Set some elements anew, the working copy included, and empty their optimizer states; all processes call it.

        Args:
            parameter: any.
            where: which elements of the whole, flattened parameter, bool on the CPU.
            values: of that shape, on the CPU.
        """

    def loss_scale(self) -> float:
        """Factor on all gradients (fp16)."""

    def whole(self, parameters: Sequence[nn.Parameter]) -> Any:
        """Context in which the parameters are whole on this process."""


class WholeEngine:
    """One process, DDP, and DeepSpeed without partitions: every process holds everything.

    Args:
        scale: the current loss scale.
        optimizer: whose states :meth:`overwrite` empties.
    """

    partitioned = False

    def __init__(self, scale: Callable[[], float] = lambda: 1.0, optimizer: Any = None) -> None:
        self.loss_scale = scale
        self.optimizer = optimizer

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """All of it."""
        return 0, parameter.numel()

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Flat views."""
        return [parameter.detach().view(-1) for parameter in parameters]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Flat views of ``.grad``, which is made where it is missing."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad.view(-1) for parameter in parameters if parameter.grad is not None]

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Views: nothing to do."""

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor) -> None:
        """In place."""
        put(parameter.data, where, values)
        if self.optimizer is not None:
            empty(self.optimizer.state.get(parameter, {}), where)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """They are."""
        return nullcontext()


class _ZeroEngine:
    """What the ZeRO stages share: the optimizer that owns the pieces."""

    partitioned = True

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def loss_scale(self) -> float:
        """1 for bf16 and fp32."""
        return float(self.optimizer.cur_scale)


class Zero12Engine(_ZeroEngine):
    """ZeRO-1 and 2: parameters whole, gradients and optimizer states in pieces.

    Pieces are found in the optimizer's own tables. ``param._hp_mapping``, which ``safe_get_full_grad`` relies on, is
    wrong under ``round_robin_gradients`` (DeepSpeed 0.19.8): it assumes the order before the round robin.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.places: dict[int, tuple[int, int, int, int]] = {}  # group, start in parameter, start in partition, length
        for group, parameters in enumerate(optimizer.params_in_partition):
            partition = dist.get_rank(group=optimizer.real_dp_process_group[group])
            for parameter in parameters:
                identity = optimizer.get_param_id(parameter)
                start = int(optimizer.grad_start_offset[group][partition][identity])
                place = int(optimizer.grad_partition_insertion_offset[group][partition][identity])
                length = min(parameter.numel() - start, int(optimizer.partition_size[group]) - place)
                self.places[id(parameter)] = (group, start, place, length)

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """What of it lies in this process's partition."""
        _, start, _, length = self.places.get(id(parameter), (0, 0, 0, 0))
        return start, length

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Views of the fp32 partitions."""
        flat = [partition.detach().view(-1) for partition in self.optimizer.single_partition_of_fp32_groups]
        return [self._cut(flat, parameter) for parameter in parameters]

    def _cut(self, flat: Sequence[Tensor], parameter: nn.Parameter) -> Tensor:
        group, _, place, length = self.places.get(id(parameter), (0, 0, 0, 0))
        return flat[group].narrow(0, place, length)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Views of the averaged gradients."""
        if self.optimizer.cpu_offload:
            self.optimizer._wait_for_offload_copies()  # they are still on their way from the GPU
            flat = [partition.grad.view(-1) for partition in self.optimizer.single_partition_of_fp32_groups]
            return [self._cut(flat, parameter) for parameter in parameters]
        found = self._by_place()
        empty = parameters[0].detach().view(-1)[:0].float()
        places = [self.places.get(id(parameter)) for parameter in parameters]
        return [empty if place is None else found[place[0], place[2]] for place in places]

    def _by_place(self) -> dict[tuple[int, int], Tensor]:
        """Averaged gradients by group and start: the lists hold them, and padding, in the order of the partition."""
        found: dict[tuple[int, int], Tensor] = {}
        for group, gradients in self.optimizer.averaged_gradients.items():
            offset = 0
            for gradient in gradients or ():
                found[group, offset] = gradient.view(-1)
                offset += gradient.numel()
        return found

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Views; but with offload the norms that clipping uses were taken before."""
        if not self.optimizer.cpu_offload:
            return
        norms = self.optimizer.norm_for_param_grads
        for parameter, gradient in zip(parameters, gradients, strict=True):
            identity = self.optimizer.get_param_id(parameter)
            if identity in norms:
                norms[identity] = gradient.to(norms[identity].dtype).norm(2).to(norms[identity].device)

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor) -> None:
        """The whole working copy, on every process, and the owned piece of the fp32 copy."""
        put(parameter.data, where, values)
        if id(parameter) not in self.places:
            return
        group, start, place, length = self.places[id(parameter)]
        flat = self.optimizer.single_partition_of_fp32_groups[group]
        put(flat.data.view(-1).narrow(0, place, length), where[start:][:length], values[start:][:length])
        state = self.optimizer.optimizer.state[flat]
        pieces = {key: v.view(-1).narrow(0, place, length) for key, v in state.items() if is_like(v, flat)}
        empty(pieces, where[start:][:length])

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """They are."""
        return nullcontext()


class Zero3Engine(_ZeroEngine):
    """ZeRO-3: everything in pieces; the last process's piece is padded."""

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """An equal share, rounded up, less the padding."""
        share = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = share * dist.get_rank()
        return start, max(0, min(share, parameter.ds_numel - start))  # type: ignore[attr-defined]

    def _owned(self, parameter: nn.Parameter, padded: Tensor) -> Tensor:
        return padded.detach().view(-1)[: self.piece(parameter)[1]]

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The fp32 partitions without their padding."""
        return [self._owned(p, self.optimizer.get_local_fp32_param(p)) for p in parameters]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The gradient partitions (copies, unless they are fp32) without their padding."""
        return [self._owned(p, self.optimizer.get_local_fp32_grad_for_param(p)) for p in parameters]

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Write the copies back, padded."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            padding = parameter.ds_tensor.ds_numel - gradient.numel()  # type: ignore[attr-defined]
            self.optimizer.set_local_grad_for_param(nn.functional.pad(gradient, (0, padding)), parameter)

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor) -> None:
        """The owned piece: the working copy, the fp32 copy and the states beside it."""
        start, length = self.piece(parameter)
        where, values = where[start:][:length], values[start:][:length]
        put(parameter.ds_tensor.data.view(-1)[:length], where, values)  # type: ignore[attr-defined]
        group = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)][0]
        state = self.optimizer.optimizer.state[self.optimizer.fp32_partitioned_groups_flat[group]]
        kinds = [key for key, v in state.items() if is_like(v, self.optimizer.fp32_partitioned_groups_flat[group])]
        for kind in (None, *kinds):
            held = self.optimizer.get_local_fp32_param(parameter, kind).clone()
            put(held.view(-1)[:length], where, values if kind is None else torch.zeros_like(values))
            self.optimizer.set_local_hp_param(held, parameter, kind)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather all of them in one collective; nothing may be changed."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield


def find_engine(parameter: nn.Parameter, trainer: Any) -> Engine:
    """The engine that a prepared Trainer trains with."""
    optimizer: Any = getattr(getattr(trainer, "deepspeed", None), "optimizer", None)
    if hasattr(parameter, "ds_id"):
        return Zero3Engine(optimizer)
    if hasattr(optimizer, "grad_partition_insertion_offset"):
        return Zero12Engine(optimizer)
    if hasattr(optimizer, "cur_scale"):  # DeepSpeed without ZeRO
        return WholeEngine(lambda: float(optimizer.cur_scale))
    scaler, optimizer = getattr(trainer.accelerator, "scaler", None), trainer.optimizer
    scale = (lambda: 1.0) if scaler is None else (lambda: float(scaler.get_scale()))
    return WholeEngine(scale, getattr(optimizer, "optimizer", optimizer))


def before_clipping(accelerator: Any, hook: Callable[[], None]) -> None:
    """Call ``hook`` once gradients are complete and not yet clipped, once per optimizer step, without DeepSpeed.

    The Trainer asks its accelerator for the gradient norm at every step, whether it clips or not; its callbacks only
    come after that.
    """
    _call_before(accelerator, "clip_grad_norm_", hook)


def before_deepspeed_step(engine: Any, hook: Callable[[], None]) -> None:
    """Call ``hook`` between ``engine.backward`` and ``engine.step``.

    accelerate calls both inside ``backward``, so that the Trainer's callbacks come too late; it calls ``step`` only at
    accumulation boundaries.
    """
    _call_before(engine, "step", hook)


def _call_before(owner: Any, name: str, hook: Callable[[], None]) -> None:
    """Put ``hook`` in front of one object's method."""
    original = getattr(owner, name)

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        hook()
        return original(*args, **kwargs)

    setattr(owner, name, method)
