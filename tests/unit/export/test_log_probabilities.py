"""Log-probabilities computed layer by layer in fp32 are those of a float model, and so are their differences."""

import pytest
import torch

from llamafactory_adaptive.export.verify import log_probabilities
from tests.helpers.tiny import tiny_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_widened_one_by_one_compute_what_a_float_model_does(dtype, tied):
    model, rows = tiny_model("qwen2", tie_word_embeddings=tied).to(dtype), [[1, 2, 3, 4, 5], [9, 8]]
    layerwise = log_probabilities.log_probabilities(model, rows)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    expected = log_probabilities.log_probabilities(model.float(), rows)
    assert all(torch.equal(a, b) for a, b in zip(layerwise, expected, strict=True))


def test_weights_are_restored_after_an_exception():
    model = tiny_model().bfloat16()
    with pytest.raises(IndexError):
        log_probabilities.log_probabilities(model, [[10_000]])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_last_place_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 1.5, -3.0, 1024.0, 0.1], dtype=dtype)
    away = torch.nextafter(values, torch.sign(values) * torch.tensor(float("inf"), dtype=dtype))
    assert torch.equal(log_probabilities.last_place(values), (away - values).abs().float())


def test_differences_are_taken_among_the_references_best_tokens():
    reference = [torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -0.5, -0.6]])]
    other = [torch.tensor([[-1.1, -2.0, -50.0], [-9.0, -0.5, -0.9]])]
    assert log_probabilities.largest_difference(reference, other, top_k=2) == pytest.approx(0.3)
    assert log_probabilities.largest_difference(reference, [torch.full((2, 3), float("nan"))]) == float("inf")
