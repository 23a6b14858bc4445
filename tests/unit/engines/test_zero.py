"""Changes to parameters under ZeRO-3, on what DeepSpeed keeps of one: working copies, fp32 piece, optimizer states."""

from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive.engines import zero
from llamafactory_adaptive.engines.zero import Zero3Engine


WHOLE = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -1.5]])


class Optimizer:
    """What DeepSpeed's optimizer offers of one parameter: its padded fp32 piece and the states of that piece."""

    def __init__(self, piece):
        self.fp32 = piece.float().clone()
        self.states = {"exp_avg": torch.full_like(self.fp32, 4.0), "exp_avg_sq": torch.full_like(self.fp32, 16.0)}
        self.fp32_partitioned_groups_flat, self.grad_position = [self.fp32], {0: (0,)}
        self.optimizer = SimpleNamespace(state={self.fp32: self.states})

    def get_param_id(self, parameter):
        return 0

    def get_local_fp32_param(self, parameter, key=None):
        return self.fp32 if key is None else self.states[key]

    def set_local_hp_param(self, value, parameter, key=None):
        self.get_local_fp32_param(parameter, key).copy_(value)


def held(piece, working):
    """A parameter with its piece and the working copy, as ``zero.Init`` makes them, and an engine."""
    parameter = torch.nn.Parameter(working)
    parameter.ds_tensor, parameter.ds_numel = piece, WHOLE.numel()
    piece.ds_numel = piece.numel()
    return parameter, Zero3Engine(Optimizer(piece))


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """This process is the first."""
    monkeypatch.setattr(zero.dist, "get_rank", lambda: 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_working_copy_that_is_the_piece_itself_is_scaled_once(dtype):
    piece = WHOLE.clone().to(dtype).flatten()
    parameter, engine = held(piece, piece.view(2, 3))
    assert parameter.data_ptr() == piece.data_ptr()
    engine.rescale(parameter, 0.5, 0.25)
    expected = (0.5 * WHOLE).to(dtype)
    assert torch.equal(parameter.detach(), expected)
    assert torch.equal(piece, expected.flatten())
    assert torch.equal(engine.optimizer.fp32, 0.5 * WHOLE.flatten())
    assert {key: set(value.tolist()) for key, value in engine.optimizer.states.items()} == {
        "exp_avg": {1.0}, "exp_avg_sq": {1.0}}  # fmt: skip


@pytest.mark.parametrize("working", [WHOLE.clone(), torch.empty(0)], ids=["gathered", "in pieces"])
def test_the_piece_and_a_gathered_working_copy_are_each_scaled(working):
    piece = WHOLE.flatten()[:3].clone()
    parameter, engine = held(piece, working)
    engine.rescale(parameter, 0.5, 1.0)
    assert torch.equal(piece, 0.5 * WHOLE[0])
    assert torch.equal(engine.optimizer.fp32, 0.5 * WHOLE[0])
    assert torch.equal(parameter.detach(), 0.5 * WHOLE if working.numel() else working)
    assert set(engine.optimizer.states["exp_avg"].tolist()) == {4.0}


def test_a_piece_of_one_element_has_its_states_scaled():
    """Five of the last piece's elements are padding."""
    padded = torch.tensor([1.0, 0, 0, 0, 0, 0])
    parameter, engine = held(padded, torch.empty(0))
    parameter.ds_numel = 1
    engine.rescale(parameter, 0.5, 0.25)
    assert engine.optimizer.fp32.tolist() == [0.5, 0, 0, 0, 0, 0]
    assert padded.tolist() == [0.5, 0, 0, 0, 0, 0]
    assert engine.optimizer.states["exp_avg"].tolist() == [1.0, 0, 0, 0, 0, 0]
