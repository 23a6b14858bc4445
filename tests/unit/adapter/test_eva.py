"""EVA's vectors against PEFT's own and against a dense decomposition, and what they are not computed from."""

import dataclasses

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import nn

from llamafactory_adaptive.adapter import eva
from llamafactory_adaptive.adapter.eva import InputDirections
from llamafactory_adaptive.adapter.lora import live_factors
from llamafactory_adaptive.calibration.batches import Batch, make_batches
from llamafactory_adaptive.errors import CalibrationError
from tests.helpers.inputs import captured_inputs, targets
from tests.helpers.tiny import rows, tiny_model


RANK = 4


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def full_rows(count, width=20):
    """Rows of one length, all of whose tokens are trained on."""
    ids = torch.randint(0, 256, (count, width), generator=torch.Generator().manual_seed(5))
    return Batch(ids, torch.ones_like(ids), ids)


def directions(model, batches, rank=RANK):
    return InputDirections(rank)(model, targets(model), batches)


def test_vectors_are_those_of_peft_where_ranks_are_uniform_and_nothing_is_masked():
    batches = [full_rows(6), full_rows(5, 18)]
    found = directions(tiny_model(), batches)
    config = LoraConfig(r=RANK, target_modules=list(found), init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    adapted = get_peft_model(tiny_model(), config)
    data = [{"input_ids": batch.input_ids, "attention_mask": batch.attention_mask} for batch in batches]
    initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    expected = {name: a.weight for name, (a, _) in live_factors(adapted).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_prompts_and_padding_do_not_count(model):
    data = rows(8)
    [batch] = make_batches(data, 8, pad_id=258)
    found = directions(model, [batch])
    inputs = captured_inputs(model, data)
    answers = torch.cat([torch.tensor(row["labels"]) for row in data]) != -100
    for name, x in inputs.items():
        answered = x[answers]
        exact = torch.linalg.svd(answered - answered.mean(0), full_matrices=False).Vh[:2]
        assert (found[name][:2].double() * exact).sum(1).abs().min() > 0.98, name
    padded = dataclasses.replace(batch, input_ids=batch.input_ids.where(batch.attention_mask.bool(), 7))
    other = directions(model, [padded])
    assert all(torch.equal(other[name], found[name]) for name in found), "whatever stands in the padding"


def test_modules_of_fewer_inputs_than_the_rank_get_as_many_vectors_as_inputs():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(256, 3)
            self.up = nn.Linear(3, 12)
            self.down = nn.Linear(12, 3)

        def forward(self, input_ids, **_):
            return self.down(self.up(self.embedding(input_ids)).tanh())

    narrow = Narrow()
    found = InputDirections(5)(narrow, {"up": narrow.up, "down": narrow.down}, [full_rows(20)])
    assert {name: tuple(a.shape) for name, a in found.items()} == {"up": (3, 3), "down": (5, 12)}
    assert all(torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-5) for a in found.values())


class Twice(nn.Module):
    """One layer that is called two times in a pass, and one that reads what its first call reads."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 8)
        self.shared, self.beside = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids, **_):
        x = self.embedding(input_ids)
        return self.shared(4.0 * self.shared(x).tanh().roll(1, -1)) + self.beside(x)


def test_a_module_that_is_called_twice_starts_from_the_inputs_of_both_calls():
    torch.manual_seed(3)
    model, seen = Twice(), []
    batch = full_rows(40)
    with model.shared.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].flatten(0, 1))):
        model(batch.input_ids)
    found = InputDirections(2)(model, {"shared": model.shared}, [batch])["shared"]
    first, both = (torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2] for x in (seen[0], torch.cat(seen)))
    assert (found * both).sum(1).abs().min() > 0.98
    assert (found * first).sum(1).abs().min() < 0.8, "the inputs of one call are others"


def test_a_module_that_reads_more_than_one_whose_vectors_it_would_get_is_named():
    model = Twice()
    with pytest.raises(CalibrationError, match="cannot start beside: it reads the first input of shared, but not the"):
        InputDirections(2)(model, {"shared": model.shared, "beside": model.beside}, [full_rows(40)])
    assert not any(module._forward_hooks for module in model.modules())


# -- what has no such start ------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """One layer per token, one that reads tokens of all samples mixed, one that is not called."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.embedding = nn.Embedding(256, 8)
        self.plain, self.expert, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = scale

    def forward(self, input_ids, **_):
        x = self.plain(self.embedding(input_ids) * self.scale)
        return self.expert(x.flatten(0, 1))


@pytest.mark.parametrize(
    ("name", "scale", "said"),
    [
        ("expert", 1.0, "cannot start expert: it reads tokens of all samples mixed"),
        ("idle", 1.0, "cannot start idle: it reads nothing of these rows; take it out of lora_target"),
        ("plain", float("nan"), "cannot start plain: it reads NaN or infinity: check the base model"),
    ],
)
def test_a_module_without_one_finite_input_per_token_is_named(name, scale, said):
    mixed = Mixed(scale)
    with pytest.raises(CalibrationError) as caught:
        InputDirections(2)(mixed, {name: mixed.get_submodule(name)}, [full_rows(4)])
    assert said in str(caught.value)
    assert not any(module._forward_hooks for module in mixed.modules())


def test_too_few_tokens_in_every_batch_are_told_with_both_numbers(model):
    with pytest.raises(CalibrationError) as caught:
        directions(model, [full_rows(1, 5), full_rows(1, 6)], rank=8)
    assert "needs 8 tokens that are trained on in one batch, as many as the largest rank" in str(caught.value)
    assert "the largest batch has 6; raise adaptive_calibration_batch_size" in str(caught.value)


def test_vectors_that_do_not_settle_end_the_pass_and_leave_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(eva, "_MOST_PASSES", 1)
    monkeypatch.setattr(eva, "_MOST_BATCHES", 2)
    live = tiny_model().train()
    with pytest.raises(CalibrationError, match="no steady directions of the inputs in 2 batches"):
        directions(live, [full_rows(3), full_rows(2, 12)])
    assert not any(module._forward_hooks for module in live.modules())
    assert live.training
    assert all(parameter.requires_grad for parameter in live.parameters())
