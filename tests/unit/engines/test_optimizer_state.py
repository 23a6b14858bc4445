"""Changes to weights and optimizer states from outside, against a real AdamW step and its formulas."""

import bitsandbytes
import pytest
import torch

from llamafactory_adaptive.engines.optimizer_state import (
    is_like,
    keeps_known_states,
    put,
    restart,
    scale_states,
    square_sums,
)
from llamafactory_adaptive.errors import GuardError


BETAS = (0.9, 0.999)
WHERE = torch.tensor([True, False, False, True, False, True])


def stepped(steps=3, **settings):
    """A parameter of six weights after real steps of AdamW, its optimizer, and the gradients it was given."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(2, 3, generator=generator))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, betas=BETAS, **settings)
    gradients = [torch.randn(2, 3, generator=generator) for _ in range(steps)]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer, gradients


def running_mean(values, beta):
    """Exponential mean that starts from zero, by its recursion, in fp64."""
    mean = torch.zeros(6, dtype=torch.float64)
    for value in values:
        mean = beta * mean + (1 - beta) * value.double().flatten()
    return mean


def test_values_are_put_where_they_are_marked_and_nowhere_else():
    target = torch.arange(6.0).view(2, 3)
    put(target, WHERE, torch.arange(10.0, 16.0))
    assert target.tolist() == [[10, 1, 2], [13, 4, 15]]


def test_values_take_the_type_of_where_they_are_put():
    target = torch.zeros(2, 3, dtype=torch.bfloat16)
    put(target, WHERE, torch.full((6,), 1 / 3, dtype=torch.float64))
    assert target.flatten().tolist() == [float(torch.tensor(1 / 3).bfloat16()) * bool(on) for on in WHERE]


def test_only_a_state_of_one_number_per_weight_is_like_its_parameter():
    parameter, optimizer, _ = stepped()
    state = optimizer.state[parameter]
    assert {key: is_like(value, parameter) for key, value in state.items()} == {
        "step": False, "exp_avg": True, "exp_avg_sq": True}  # fmt: skip
    assert not is_like(3, parameter)
    assert not is_like(torch.zeros(5), parameter)
    assert not is_like(torch.zeros(1), torch.zeros(1)), "a single number may be a step count"


def test_sums_of_squares_are_those_of_adamws_running_mean():
    parameter, optimizer, gradients = stepped()
    expected = running_mean([gradient.square() for gradient in gradients], BETAS[1])[WHERE]
    total, count = square_sums(optimizer.state[parameter], WHERE)
    assert total.dtype == torch.float64
    assert (float(total), float(count)) == (pytest.approx(float(expected.sum()), rel=1e-5), 3)
    assert square_sums(optimizer.state[parameter], torch.zeros(6, dtype=torch.bool)).tolist() == [0, 0]


def test_an_optimizer_without_squares_or_without_a_step_has_no_sums():
    assert square_sums({}, WHERE).tolist() == [0, 0]
    assert square_sums({"momentum_buffer": torch.ones(2, 3)}, WHERE).tolist() == [0, 0]


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_restart_touches_the_marked_weights_alone(amsgrad):
    parameter, optimizer, _ = stepped(amsgrad=amsgrad)
    state = optimizer.state[parameter]
    before = {key: value.clone() for key, value in state.items()}
    restart(state, WHERE, square=0.25)
    expected = {"exp_avg": 0.0, "exp_avg_sq": 0.25} | ({"max_exp_avg_sq": 0.25} if amsgrad else {})
    assert set(state) == {"step", *expected}
    assert torch.equal(state["step"], before["step"])
    for key, value in expected.items():
        assert state[key].flatten()[WHERE].tolist() == [value] * 3
        assert torch.equal(state[key].flatten()[~WHERE], before[key].flatten()[~WHERE])


def test_the_next_step_after_a_restart_is_adamws_own():
    """Restarted weights move as the formula says of zero momentum and the given square; the others as ever."""
    parameter, optimizer, gradients = stepped(weight_decay=0.0)
    twin, twin_optimizer, _ = stepped(weight_decay=0.0)
    restart(optimizer.state[parameter], WHERE, square=0.25)
    before, gradient = parameter.detach().clone().flatten().double(), gradients[0].double().flatten()
    for each, its_optimizer in ((parameter, optimizer), (twin, twin_optimizer)):
        each.grad = gradients[0].clone()
        its_optimizer.step()
    mean = (1 - BETAS[0]) * gradient / (1 - BETAS[0] ** 4)
    square = (BETAS[1] * 0.25 + (1 - BETAS[1]) * gradient.square()) / (1 - BETAS[1] ** 4)
    expected = before - 0.1 * mean / (square.sqrt() + 1e-8)
    assert torch.allclose(parameter.detach().flatten()[WHERE].double(), expected[WHERE], rtol=1e-5)
    assert torch.equal(parameter.detach().flatten()[~WHERE], twin.detach().flatten()[~WHERE])


@pytest.mark.parametrize("step", [torch.tensor(3.0), torch.tensor([3.0])], ids=["no dimension", "one"])
def test_states_of_one_weight_are_told_from_the_step_count(step):
    """A process may own a single weight of a parameter."""
    one = torch.ones(1, dtype=torch.bool)
    state = {"step": step, "exp_avg": torch.tensor([2.0]), "exp_avg_sq": torch.tensor([8.0])}
    scale_states(state, 1, 0.5)
    assert {key: float(value) for key, value in state.items()} == {"step": 3, "exp_avg": 1, "exp_avg_sq": 2}
    assert square_sums(state, one).tolist() == [2, 1]
    restart(state, one, square=0.25)
    assert {key: float(value) for key, value in state.items()} == {"step": 3, "exp_avg": 0, "exp_avg_sq": 0.25}


def test_a_quantised_state_takes_the_nearest_of_its_values():
    values = torch.linspace(0, 1, 256)
    state = {
        "state1": torch.full((6,), 9, dtype=torch.uint8),
        "state2": torch.full((6,), 51, dtype=torch.uint8),  # 51/255 = 0.2
        "qmap1": values - values[128],
        "qmap2": values,
        "absmax1": torch.ones(2),
        "absmax2": torch.ones(2),
        "step": 4,
    }
    total, count = square_sums(state, WHERE)
    assert (float(total), float(count)) == (pytest.approx(0.6), 3)
    restart(state, WHERE, square=0.4011)
    assert state["state1"].tolist() == [128, 9, 9, 128, 9, 128], "the index of zero"
    assert state["state2"].tolist() == [102, 51, 51, 102, 51, 102], "102/255 = 0.4"
    assert state["absmax1"].tolist() == [1, 1]


def test_a_state_that_is_not_kept_per_weight_cannot_restart():
    state = {"exp_avg": torch.ones(6), "exp_avg_sq_row": torch.ones(2)}
    with pytest.raises(GuardError, match=r"the optimizer's exp_avg_sq_row is not kept per weight.*optim: adamw_torch"):
        restart(state, WHERE, 0.0)
    with pytest.raises(GuardError, match="exp_avg_sq_row is not kept per weight"):
        square_sums(state, WHERE)
    assert torch.equal(state["exp_avg"], torch.ones(6)), "nothing is changed before the refusal"


class Derived(torch.optim.AdamW):
    """A class of a user's own, with the states of its base."""


@pytest.mark.parametrize(
    ("kind", "known"),
    [(torch.optim.AdamW, True), (torch.optim.SGD, True), (torch.optim.RMSprop, True), (Derived, True),
     (bitsandbytes.optim.PagedAdamW8bit, True), (bitsandbytes.optim.Lion, True),
     (torch.optim.Rprop, False), (torch.optim.Adadelta, False), (torch.optim.ASGD, False),
     (bitsandbytes.optim.RMSprop, False), (bitsandbytes.optim.Adagrad8bit, False),
     (bitsandbytes.optim.AdEMAMix, False)],
    ids=lambda value: f"{value.__module__.partition('.')[0]}-{value.__name__}" if isinstance(value, type) else "",
)  # fmt: skip
def test_known_optimizers_are_told_from_others(kind, known):
    assert keeps_known_states(kind([torch.nn.Parameter(torch.zeros(4))], lr=1e-3)) is known
