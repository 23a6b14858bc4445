"""FSDP2 on two processes: what an engine reads, sets and scales of the rows of each, against whole parameters."""

import os

import pytest
import torch
from torch import distributed as dist
from torch import nn

from llamafactory_adaptive.engines.engine import UnpartitionedEngine
from llamafactory_adaptive.engines.fsdp import Fsdp2Engine, is_sharded
from tests.helpers.workers import said_by_two


# An odd number of rows, one row for two processes, and a vector.
SHAPES = [(5, 3), (1, 4), (3,)]
CHANGED = {"where": 2, "square": 0.5, "factor": 3.0, "gradient_factor": 0.25}


def _toy():
    torch.manual_seed(0)
    toy = nn.Module()
    toy.factors = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
    toy.forward = lambda: sum(((index + 1) * factor**2).sum() for index, factor in enumerate(toy.factors))
    return toy


def _changed(toy, engine):
    """One step of Adam, then every change that an engine makes, and what it tells of the parameters."""
    parameters, told = list(toy.factors), []
    adam = torch.optim.Adam(parameters, lr=0.1)
    engine = engine(lambda: 1.0, adam)
    toy().backward()
    engine.set_gradients(parameters, [gradient.mul_(2) for gradient in engine.gradients(parameters)])
    adam.step()
    for parameter in parameters:
        everywhere = torch.ones(parameter.numel(), dtype=torch.bool)
        told.append(engine.square_sums(parameter, everywhere))
        engine.overwrite(parameter, torch.arange(parameter.numel()) == CHANGED["where"],
                         torch.full((parameter.numel(),), 7.0), CHANGED["square"])  # fmt: skip
        engine.rescale(parameter, CHANGED["factor"], CHANGED["gradient_factor"])
    states = [adam.state[p][key] for p in parameters for key in ("exp_avg", "exp_avg_sq")]
    return [*parameters, *states], torch.stack(told), engine


def _as_whole(rank, shapes):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo")
    from torch.distributed.fsdp import fully_shard

    expected, sums, _ = _changed(_toy(), UnpartitionedEngine)
    toy = fully_shard(_toy())
    assert all(is_sharded(parameter) for parameter in toy.parameters())
    found, theirs, engine = _changed(toy, Fsdp2Engine)
    dist.all_reduce(theirs)
    assert torch.allclose(theirs, sums)
    for sharded, whole in zip(found, expected, strict=True):
        assert torch.allclose(sharded.detach().full_tensor(), whole.detach(), atol=1e-7)
    parameters = list(toy.factors)
    for parameter, rows, whole in zip(parameters, engine.weights(parameters), expected, strict=False):
        start, length = engine.piece(parameter)
        assert torch.equal(rows, whole.detach().view(-1)[start:][:length])
    with engine.whole(parameters) as copies:
        assert all(torch.equal(copy, whole) for copy, whole in zip(copies, expected, strict=False))
    return "the same"


@pytest.mark.slow
def test_what_an_engine_does_to_rows_is_what_it_does_to_whole_parameters():
    assert said_by_two(_as_whole, SHAPES) == ["the same", "the same"]
