"""Second moments of inputs against autograd and inputs captured row by row."""

import pytest
import torch

from llamafactory_adaptive.calibration import input_moments
from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.calibration.input_moments import InputSecondMoments
from llamafactory_adaptive.errors import CalibrationError
from tests.helpers.inputs import captured_inputs, targets
from tests.helpers.tiny import rows, tiny_model


def test_second_moments_are_the_hessian_diagonal_of_a_linear_layer():
    """H of 1/2 sum_t (w . x_t)^2 is X^T X; autograd differentiates twice, our sum does not."""
    x = torch.randn(40, 7, dtype=torch.float64)

    def reconstruction(w):
        return 0.5 * (x @ w).square().sum()

    hessian = torch.autograd.functional.hessian(reconstruction, torch.randn(7, dtype=torch.float64))
    assert torch.allclose(input_moments.second_moment_sum(x), hessian.diagonal(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_weights_pick_and_weigh_across_chunks(dtype, monkeypatch):
    monkeypatch.setitem(input_moments._CHUNK_ELEMENTS, "cpu", 50)  # several chunks, the last one short
    x, weights, mask = torch.randn(33, 6).to(dtype), torch.rand(33), torch.zeros(33)
    rows = torch.tensor([0, 3, 4, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 32])
    mask[rows] = 1
    spans = input_moments.spans_of(mask)
    assert spans == [(0, 1), (3, 5), (9, 10), (20, 30), (32, 33)]
    expected = (weights[rows].double()[:, None] * x[rows].double() ** 2).sum(0)
    assert torch.allclose(input_moments.second_moment_sum(x, spans, weights), expected, rtol=1e-5)
    assert torch.allclose(input_moments.second_moment_sum(x, spans), (x[rows].double() ** 2).sum(0), rtol=1e-5)
    assert torch.allclose(input_moments.second_moment_sum(x), (x.double() ** 2).sum(0), rtol=1e-5)


def test_the_input_is_left_alone():
    x = torch.randn(5, 3)
    before = x.clone()
    input_moments.second_moment_sum(x)
    assert torch.equal(x, before)


def test_second_moments_match_inputs_captured_row_by_row():
    model, data = tiny_model("qwen3"), rows(8)
    measured = InputSecondMoments()(model, targets(model), make_batches(data, 4, 0))
    for name, inputs in captured_inputs(model, data).items():
        assert torch.allclose(measured[name], inputs.square().mean(0), rtol=1e-5), name


def test_gradient_weighting_matches_gradients_taken_row_by_row():
    model, data = tiny_model(), rows(5)
    moments = InputSecondMoments("gradient")(model, targets(model), make_batches(data, 2, 0))
    expected, tokens = dict.fromkeys(targets(model), 0.0), 0
    for row in data:
        kept = {}

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept[module] = (args[0], output)

        handles = [m.register_forward_hook(keep) for m in targets(model).values()]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum").backward()
        for name, module in targets(model).items():
            x, output = kept[module]
            expected[name] += (output.grad[0].square().sum(-1)[:, None] * x[0].square()).sum(0).detach()
        tokens += len(row["input_ids"])
        for handle in handles:
            handle.remove()
    for name in moments:
        assert torch.allclose(moments[name].float(), expected[name] / tokens, rtol=1e-3, atol=1e-12), name


def test_a_shared_input_is_reduced_once(monkeypatch):
    from llamafactory_adaptive.calibration import input_moments

    calls = []
    real = input_moments.second_moment_sum
    monkeypatch.setattr(input_moments, "second_moment_sum", lambda *a: calls.append(1) or real(*a))
    model = tiny_model()
    InputSecondMoments()(model, targets(model), make_batches(rows(3), 3, 0))
    assert len(calls) == 2 * 4  # per layer: q/k/v, o, gate/up, down


def test_a_module_without_tokens_and_nan_inputs_are_named():
    model = tiny_model()
    stray = torch.nn.Linear(4, 4)
    with pytest.raises(CalibrationError, match="1 of 15 target modules saw no calibration token, for example ghost"):
        InputSecondMoments()(model, {**targets(model), "ghost": stray}, make_batches(rows(2), 2, 0))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"layers\.1\.mlp\.down_proj contain NaN"):
        InputSecondMoments()(model, targets(model), make_batches(rows(2), 2, 0))


def test_a_routed_input_with_padding_is_refused():
    class Routed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.expert = torch.nn.Embedding(300, 4), torch.nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask, use_cache):
            return self.expert(self.embed(input_ids).flatten(0, 1)[::2])

    model = Routed()
    with pytest.raises(CalibrationError, match="adaptive_calibration_batch_size: 1"):
        InputSecondMoments()(model, {"expert": model.expert}, make_batches(rows(3), 3, 0))
    assert InputSecondMoments()(model, {"expert": model.expert}, make_batches(rows(3), 1, 0))
