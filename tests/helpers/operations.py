"""Counts of the tensor operations that code dispatches, on a device or on one that is not there."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode


aten = torch.ops.aten
# They launch nothing, but are no views by their schema.
_NO_KERNEL = {aten._unsafe_view.default, aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default}
_WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}


class Operations(TorchDispatchMode):
    """Context that counts kernels, that is operations other than views, and what makes the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.kernels, self.views, self.waits = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = self.result(func, args, kwargs or {})
        (self.views if func.is_view or func in _NO_KERNEL else self.kernels)[func.name()] += 1
        if self.waits_for(func, args, result):
            self.waits[func.name()] += 1
        return result

    def result(self, func, args, kwargs):
        return func(*args, **kwargs)

    @staticmethod
    def waits_for(func, args, result):
        if func == aten.copy_.default:
            return args[1].device.type != "cpu" and args[0].device.type == "cpu"
        if func not in {*_WAITING, aten._to_copy.default, aten.index.Tensor} or args[0].device.type == "cpu":
            return False
        if func == aten.index.Tensor:
            return _is_masked(args[1])
        return func in _WAITING or result.device.type == "cpu"


class _Answered(Operations):
    """The same on tensors without values: a value that is asked for is 1, and a mask selects everything."""

    def result(self, func, args, kwargs):
        if func == aten._local_scalar_dense.default:
            return {torch.bool: bool, torch.int64: int}.get(args[0].dtype, float)(1)
        if func == aten.index.Tensor and _is_masked(args[1]):
            return args[0].flatten(0, args[1][0].dim() - 1)
        return super().result(func, args, kwargs)


def _is_masked(indices):
    return any(index is not None and index.dtype == torch.bool for index in indices)


def counted(action):
    """What ``action`` dispatches."""
    with Operations() as operations:
        action()
    return operations


@contextmanager
def without_values():
    """Tensors of shape, type and device alone: a device ``cuda`` needs no GPU, and no operation may mix devices.

    Backward passes do not work there; gradients have to be put in place by hand.
    """
    with FakeTensorMode(), _Answered() as operations:
        yield operations


@contextmanager
def with_values():
    """Tensors as ever, within :func:`without_values`: what builds a model needs them."""
    with unset_fake_temporarily():
        yield
