"""The place in a step where gradients are complete, and the engine that a Trainer trains with."""

from types import SimpleNamespace

import torch

from llamafactory_adaptive.engines.engine import find_engine
from llamafactory_adaptive.engines.step_hooks import before_clipping, before_deepspeed_step


class Owner:
    """An accelerator and a DeepSpeed engine in one."""

    def __init__(self):
        self.said = []

    def clip_grad_norm_(self, parameters, max_norm):
        self.said.append(f"clips to {max_norm}")
        return 2.5

    def step(self):
        self.said.append("steps")


def test_the_hook_comes_before_and_what_it_stands_before_is_as_it_was():
    owner, other = Owner(), Owner()
    before_clipping(owner, lambda: owner.said.append("gradients are complete"))
    assert owner.clip_grad_norm_([], max_norm=1.0) == 2.5
    assert owner.clip_grad_norm_.__name__ == "clip_grad_norm_"
    assert owner.said == ["gradients are complete", "clips to 1.0"]
    before_deepspeed_step(owner, lambda: owner.said.append("again"))
    owner.step()
    assert owner.said[2:] == ["again", "steps"]
    other.step()
    assert other.said == ["steps"], "of one object alone"


def test_scores_are_taken_at_the_scale_that_the_trainers_scaler_has_at_that_moment():
    parameter = torch.nn.Parameter(torch.zeros(2))
    scales = iter((1024.0, 512.0))
    accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: next(scales)))
    engine = find_engine(parameter, SimpleNamespace(accelerator=accelerator, optimizer=None, deepspeed=None))
    assert [engine.loss_scale(), engine.loss_scale()] == [1024.0, 512.0]
    plain = SimpleNamespace(accelerator=SimpleNamespace(scaler=None), optimizer=None)
    assert find_engine(parameter, plain).loss_scale() == 1.0
    deepspeed = SimpleNamespace(optimizer=SimpleNamespace(cur_scale=64))
    assert find_engine(parameter, SimpleNamespace(deepspeed=deepspeed)).loss_scale() == 64.0


def test_states_are_looked_for_in_the_optimizer_that_accelerate_wraps():
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.full((4,), 2.0)
    optimizer.step()
    wrapped = SimpleNamespace(optimizer=optimizer)
    engine = find_engine(parameter, SimpleNamespace(accelerator=SimpleNamespace(), optimizer=wrapped))
    where = torch.tensor([True, False, True, True])
    total, count = engine.square_sums(parameter, where).tolist()
    assert (round(total, 6), count) == (round(3 * 0.001 * 4.0, 6), 3)
