"""The engines of DeepSpeed's ZeRO stages. The only file that imports DeepSpeed."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist

from llamafactory_adaptive.engines.optimizer_state import is_like, put, restart, scale_states, square_sums


def init_deepspeed_on_cpu() -> None:
    """Open DeepSpeed's process group before the model loads.

    Without it ``zero.Init`` of ZeRO-3 computes its batch size on a CPU as if there were one process, and an assertion
    fails. It is only called where there is no accelerator; elsewhere the Trainer opens the group in time.

    DeepSpeed would first build an operator for reductions in shared memory. gloo does that work as well; the build
    takes a minute, needs a compiler, and when it is killed leaves a lock that blocks every later run.
    """
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    if not deepspeed.comm.is_initialized():
        deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


class _ZeroEngine(ABC):
    """Base of the ZeRO engines: it holds the optimizer that owns the pieces."""

    partitioned = True

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def loss_scale(self) -> float:
        """Return the factor by which all gradients are scaled; 1 for bf16 and fp32."""
        return float(self.optimizer.cur_scale)

    @abstractmethod
    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return start and length of the piece of the flattened parameter that this process owns."""

    @abstractmethod
    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer's states of the owned piece, by name."""

    def square_sums(self, parameter: nn.Parameter, others: Tensor) -> Tensor:
        """Sum and count the optimizer's running squared gradients of owned elements that ``others`` marks, (2,)."""
        start, length = self.piece(parameter)
        return square_sums(self._state(parameter), others[start:][:length])


class Zero12Engine(_ZeroEngine):
    """Engine of ZeRO-1 and 2: parameters are whole, gradients and optimizer states are in pieces.

    Pieces are found in the optimizer's own tables. ``param._hp_mapping``, which ``safe_get_full_grad`` relies on, is
    wrong under ``round_robin_gradients`` (DeepSpeed 0.19.8): it assumes the order before the round robin.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.owned: dict[int, tuple[int, int, int, int]] = {}  # group, start in parameter, start in partition, length
        for group, parameters in enumerate(optimizer.params_in_partition):
            partition = dist.get_rank(group=optimizer.real_dp_process_group[group])
            for parameter in parameters:
                identity = optimizer.get_param_id(parameter)
                start = int(optimizer.grad_start_offset[group][partition][identity])
                offset = int(optimizer.grad_partition_insertion_offset[group][partition][identity])
                length = min(parameter.numel() - start, int(optimizer.partition_size[group]) - offset)
                self.owned[id(parameter)] = (group, start, offset, length)

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return start and length of the piece of the parameter in this process's partition; (0, 0) if none is."""
        _, start, _, length = self.owned.get(id(parameter), (0, 0, 0, 0))
        return start, length

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the owned pieces of the parameters, as views of the fp32 partitions."""
        flat = [partition.detach().view(-1) for partition in self.optimizer.single_partition_of_fp32_groups]
        return [self._cut(flat, parameter) for parameter in parameters]

    def _cut(self, flat: Sequence[Tensor], parameter: nn.Parameter) -> Tensor:
        group, _, offset, length = self.owned.get(id(parameter), (0, 0, 0, 0))
        return flat[group].narrow(0, offset, length)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the averaged gradients of the owned pieces, as views."""
        if self.optimizer.cpu_offload:
            self.optimizer._wait_for_offload_copies()  # they are still on their way from the GPU
            flat = [partition.grad.view(-1) for partition in self.optimizer.single_partition_of_fp32_groups]
            return [self._cut(flat, parameter) for parameter in parameters]
        by_offset = self._by_offset()
        empty = parameters[0].detach().view(-1)[:0].float()
        entries = [self.owned.get(id(parameter)) for parameter in parameters]
        return [empty if entry is None else by_offset[entry[0], entry[2]] for entry in entries]

    def _by_offset(self) -> dict[tuple[int, int], Tensor]:
        """Index the averaged gradients by group and start; the lists hold them, and padding, in partition order."""
        by_offset: dict[tuple[int, int], Tensor] = {}
        for group, gradients in self.optimizer.averaged_gradients.items():
            offset = 0
            for gradient in gradients or ():
                by_offset[group, offset] = gradient.view(-1)
                offset += gradient.numel()
        return by_offset

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Update the norms that clipping uses: with offload they were computed before the views were edited."""
        if not self.optimizer.cpu_offload:
            return
        norms = self.optimizer.norm_for_param_grads
        for parameter, gradient in zip(parameters, gradients, strict=True):
            identity = self.optimizer.get_param_id(parameter)
            if identity in norms:
                norms[identity] = gradient.to(norms[identity].dtype).norm(2).to(norms[identity].device)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return views of the optimizer's states of the owned piece, by name."""
        if id(parameter) not in self.owned:
            return {}
        group, _, offset, length = self.owned[id(parameter)]
        flat = self.optimizer.single_partition_of_fp32_groups[group]
        state = self.optimizer.optimizer.state[flat]
        return {key: v.view(-1).narrow(0, offset, length) for key, v in state.items() if is_like(v, flat)}

    def overwrite(self, parameter: nn.Parameter, where: Tensor, values: Tensor, square: float) -> None:
        """Set some elements of the whole working copy and the owned fp32 piece, and reset their optimizer states."""
        put(parameter.data, where, values)
        if id(parameter) not in self.owned:
            return
        group, start, offset, length = self.owned[id(parameter)]
        flat = self.optimizer.single_partition_of_fp32_groups[group]
        put(flat.data.view(-1).narrow(0, offset, length), where[start:][:length], values[start:][:length])
        restart(self._state(parameter), where[start:][:length], square)

    def rescale(self, parameter: nn.Parameter, factor: float, gradient_factor: float) -> None:
        """Scale the whole working copy, the owned fp32 piece and its optimizer states."""
        parameter.data.mul_(factor)
        if id(parameter) in self.owned:
            (piece,) = self.weights([parameter])
            piece.mul_(factor)
            scale_states(self._state(parameter), piece.numel(), gradient_factor)

    def whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[list[Tensor]]:
        return nullcontext([parameter.detach() for parameter in parameters])


class Zero3Engine(_ZeroEngine):
    """Engine of ZeRO-3: everything is in pieces of equal length; the last of them are padded."""

    def piece(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return start and length of this process's piece: an equal share, rounded up, less the padding."""
        share = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = share * dist.get_rank()
        return start, max(0, min(share, parameter.ds_numel - start))  # type: ignore[attr-defined]

    def _owned(self, parameter: nn.Parameter, padded: Tensor) -> Tensor:
        return padded.detach().view(-1)[: self.piece(parameter)[1]]

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the fp32 partitions of the parameters without their padding."""
        return [self._owned(p, self.optimizer.get_local_fp32_param(p)) for p in parameters]

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the gradient partitions (copies, unless they are fp32) without their padding."""
        return [self._owned(p, self.optimizer.get_local_fp32_grad_for_param(p)) for p in parameters]

    def set_gradients(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        """Write edited copies of gradients back to the optimizer, padded."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            padding = parameter.ds_tensor.ds_numel - gradient.numel()  # type: ignore[attr-defined]
            self.optimizer.set_local_grad_for_param(nn.functional.pad(gradient, (0, padding)), parameter)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Copy the optimizer's states of the owned piece, without padding, by name."""
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
        """Set some elements of the owned piece, in working copy and fp32 copy, and reset their optimizer states.

        Small parameters stay gathered between steps (``stage3_param_persistence_threshold``): every process sets their
        whole working copy as well.
        """
        if parameter.numel() == where.numel():
            put(parameter.data, where, values)
        start, length = self.piece(parameter)
        where, values = where[start:][:length], values[start:][:length]
        put(parameter.ds_tensor.data.view(-1)[:length], where, values)  # type: ignore[attr-defined]
        states = self._state(parameter)
        restart(states, where, square)
        fp32 = self.weights([parameter])[0].clone()
        put(fp32, where, values)
        self._store(parameter, fp32, states)

    def rescale(self, parameter: nn.Parameter, factor: float, gradient_factor: float) -> None:
        """Scale the owned piece, in working copy and fp32 copy, and its optimizer states.

        With one process the whole working copy may be the owned piece itself. It is therefore copied from the fp32
        piece, where scaling each of the two in place would scale it twice.
        """
        fp32, states = self.weights([parameter])[0] * factor, self._state(parameter)
        if parameter.numel() == parameter.ds_numel:  # type: ignore[attr-defined]
            parameter.data.mul_(factor)  # small parameters stay gathered between steps
        parameter.ds_tensor.data.view(-1)[: fp32.numel()].copy_(fp32)  # type: ignore[attr-defined]
        scale_states(states, fp32.numel(), gradient_factor)
        self._store(parameter, fp32, states)

    def _store(self, parameter: nn.Parameter, fp32: Tensor, states: dict[str, Tensor]) -> None:
        """Write the owned piece of the fp32 copy and of the optimizer's states back, padded."""
        padding = parameter.ds_tensor.ds_numel - fp32.numel()  # type: ignore[attr-defined]
        for kind, piece in ((None, fp32), *states.items()):
            self.optimizer.set_local_hp_param(nn.functional.pad(piece, (0, padding)), parameter, kind)

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
        """Gather whole parameters in one collective for the time of the context; they must not be changed."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield [parameter.detach() for parameter in parameters]
