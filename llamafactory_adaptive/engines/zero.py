"""The engines of DeepSpeed's ZeRO stages. The only file that imports DeepSpeed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from llamafactory_adaptive.engines.optimizer_state import is_like, put, restart, square_sums


def init_deepspeed_on_cpu() -> None:
    """Open DeepSpeed's process group before the model loads.

    Without it ``zero.Init`` of ZeRO-3 computes its batch size against a world of one process on CPU and asserts.
    Only called where there is no accelerator; elsewhere the Trainer does this in time.

    DeepSpeed would build an operator for reductions in shared memory first. gloo does that work as well, and the build
    costs a minute, needs a compiler, and when it is killed leaves a lock that holds up every later run.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    if not deepspeed.comm.is_initialized():
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


class _ZeroEngine(ABC):
    """What the ZeRO stages share: the optimizer that owns the pieces."""

    partitioned = True

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def loss_scale(self) -> float:
        """1 for bf16 and fp32."""
        return float(self.optimizer.cur_scale)

    @abstractmethod
    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Start and length of what this process owns of it, flat."""

    @abstractmethod
    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's states of the owned piece."""

    def square_sums(self, parameter: nn.Parameter, others: Tensor) -> Tensor:
        """Of the owned piece."""
        start, length = self.piece(parameter)
        return square_sums(self._state(parameter), others[start:][:length])


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
        by_place = self._by_place()
        empty = parameters[0].detach().view(-1)[:0].float()
        places = [self.places.get(id(parameter)) for parameter in parameters]
        return [empty if place is None else by_place[place[0], place[2]] for place in places]

    def _by_place(self) -> dict[tuple[int, int], Tensor]:
        """Averaged gradients by group and start: the lists hold them, and padding, in the order of the partition."""
        by_place: dict[tuple[int, int], Tensor] = {}
        for group, gradients in self.optimizer.averaged_gradients.items():
            offset = 0
            for gradient in gradients or ():
                by_place[group, offset] = gradient.view(-1)
                offset += gradient.numel()
        return by_place

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Views; but with offload the norms that clipping uses were taken before."""
        if not self.optimizer.cpu_offload:
            return
        norms = self.optimizer.norm_for_param_grads
        for parameter, gradient in zip(parameters, gradients, strict=True):
            identity = self.optimizer.get_param_id(parameter)
            if identity in norms:
                norms[identity] = gradient.to(norms[identity].dtype).norm(2).to(norms[identity].device)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Of the owned piece."""
        if id(parameter) not in self.places:
            return {}
        group, _, place, length = self.places[id(parameter)]
        flat = self.optimizer.single_partition_of_fp32_groups[group]
        state = self.optimizer.optimizer.state[flat]
        return {key: v.view(-1).narrow(0, place, length) for key, v in state.items() if is_like(v, flat)}

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        """The whole working copy, on every process, and the owned piece of the fp32 copy."""
        put(parameter.data, where, values)
        if id(parameter) not in self.places:
            return
        group, start, place, length = self.places[id(parameter)]
        flat = self.optimizer.single_partition_of_fp32_groups[group]
        put(flat.data.view(-1).narrow(0, place, length), where[start:][:length], values[start:][:length])
        restart(self._state(parameter), where[start:][:length], square)

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
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

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Copies of the owned piece without its padding."""
        group = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)][0]
        flat = self.optimizer.fp32_partitioned_groups_flat[group]
        state = self.optimizer.optimizer.state[flat]
        length = self.piece(parameter)[1]
        return {
            key: self.optimizer.get_local_fp32_param(parameter, key).view(-1)[:length].clone()
            for key, v in state.items()
            if is_like(v, flat)
        }

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        """The owned piece: the working copy, the fp32 copy and the states beside it.

        Small parameters stay gathered between steps (``stage3_param_persistence_threshold``): those everywhere.
        """
        if parameter.numel() == where.numel():
            put(parameter.data, where, values)
        start, length = self.piece(parameter)
        where, values = where[start:][:length], values[start:][:length]
        put(parameter.ds_tensor.data.view(-1)[:length], where, values)  # type: ignore[attr-defined]
        pieces = self._state(parameter)
        restart(pieces, where, square)
        fp32 = self.optimizer.get_local_fp32_param(parameter).view(-1)[:length].clone()
        put(fp32, where, values)
        padding = parameter.ds_tensor.ds_numel - length  # type: ignore[attr-defined]
        for kind, piece in ((None, fp32), *pieces.items()):
            self.optimizer.set_local_hp_param(nn.functional.pad(piece, (0, padding)), parameter, kind)

    @contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather all of them in one collective; nothing may be changed."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield
