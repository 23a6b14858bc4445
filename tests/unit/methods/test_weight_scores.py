"""fisher, gora_ranks and srlora against autograd on the base weights and dense decompositions; prilora by hand."""

import pytest
import torch
from torch.nn import functional

from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.methods import ScoringContext, make_method
from llamafactory_adaptive.methods.fisher import SampleFisher
from llamafactory_adaptive.ranks.plan import ModuleShape
from tests.helpers.inputs import targets
from tests.helpers.tiny import ARCHITECTURES, rows, tiny_model


DATA = rows(5)


def context(model):
    return ScoringContext(
        tuple(ModuleShape(n, m.in_features, m.out_features) for n, m in targets(model).items()), 8, 0
    )


def gradients(model):
    """One backward pass per sample: the gradient of its summed token loss for every target weight."""
    found = []
    for row in DATA:
        model.zero_grad()
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum").backward()
        found.append({name: module.weight.grad.double() for name, module in targets(model).items()})
    model.zero_grad()
    return found


def scored(name, model, **options):
    method, modules = make_method(name, options), targets(model)
    statistics = method.measurement()(model, modules, make_batches(DATA, 2, 0))
    assert all(tensor.shape == (1,) and tensor.device.type == "cpu" for tensor in statistics.values())
    return method.score(statistics, context(model))


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_fisher_is_the_mean_square_of_single_samples_gradients(architecture):
    model = tiny_model(architecture)
    expected = {n: sum(float(g[n].square().sum()) for g in gradients(model)) / len(DATA) for n in targets(model)}
    found = scored("fisher", model)
    assert found.values == pytest.approx(expected, rel=1e-4)
    assert found.metrics["fisher_trace"] == found.values
    sizes = {n: m.weight.numel() for n, m in targets(model).items()}
    roots = {n: (expected[n] / sizes[n]) ** 0.5 for n in sizes}
    assert scored("fisher", model, reduction="mean", power=0.5).values == pytest.approx(roots, rel=1e-4)


def test_gora_takes_the_mean_gradient_times_the_weight():
    model = tiny_model()
    samples = gradients(model)
    tokens = sum(len(row["input_ids"]) for row in DATA)
    expected = {}
    for name, module in targets(model).items():
        product = module.weight.detach().double() * sum(g[name] for g in samples) / tokens
        expected[name] = float(product.abs().mean()) / (module.in_features + module.out_features) ** 0.5
    assert scored("gora_ranks", model).values == pytest.approx(expected, rel=1e-4)


def test_srlora_takes_the_stable_rank_of_the_base_and_no_data():
    model = tiny_model()
    spectra = {name: torch.linalg.svdvals(module.weight.detach()) for name, module in targets(model).items()}
    expected = {name: float(sigma.square().sum() / sigma[0] ** 2) for name, sigma in spectra.items()}
    method = make_method("srlora", {})
    found = method.score(method.measurement()(model, targets(model), []), context(model)).values
    assert found == pytest.approx(expected, rel=1e-3)
    rooted = make_method("srlora", {"power": 0.5})
    scores = rooted.score(rooted.measurement()(model, targets(model), []), context(model))
    assert scores.values == pytest.approx({name: rank**0.5 for name, rank in expected.items()}, rel=1e-3)
    assert scores.metrics == {"stable_rank": pytest.approx(expected, rel=1e-3)}
    first = next(iter(targets(model).values()))
    first.weight.data.mul_(7.0)
    again = method.score(method.measurement()(model, targets(model), []), context(model)).values
    assert again == pytest.approx(found, rel=1e-4), "scale does not matter"
    first.weight.data.zero_()
    with pytest.raises(CalibrationError, match="is zero or not finite, so it has no stable rank"):
        method.measurement()(model, targets(model), [])


def test_modules_without_samples_of_their_own_and_without_gradients_are_named():
    class Mixed(torch.nn.Module):
        """Its expert reads the tokens of all samples mixed, and one layer nothing."""

        def __init__(self):
            super().__init__()
            self.embed, self.expert, self.idle = (
                torch.nn.Embedding(99, 8),
                torch.nn.Linear(8, 99),
                torch.nn.Linear(8, 8),
            )

        def forward(self, input_ids, **unused):
            return self.expert(self.embed(input_ids).flatten(0, 1)).view(*input_ids.shape, -1)

    model = Mixed()
    batches = make_batches([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], 1, 0)
    with pytest.raises(CalibrationError, match=r"^expert reads tokens of several samples mixed .*: sensitivity$"):
        SampleFisher()(model, {"expert": model.expert}, batches)
    products = make_method("gora_ranks", {}).measurement()
    with pytest.raises(CalibrationError, match=r"^no gradient reached idle; raise adaptive_calibration_samples"):
        products(model, {"expert": model.expert, "idle": model.idle}, batches)
    found = products(model, {"expert": model.expert}, batches)
    assert float(found["expert"]) > 0, "a mean gradient needs no single samples"


def test_prilora_is_linear_over_the_layers_of_each_tower():
    names = [*(f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 2, 10)), "visual.blocks.0.fc", "visual.blocks.1.fc",
             "audio.0.fc", "score", "visual.merger.mlp.0", "visual.merger.mlp.2"]  # fmt: skip
    shapes = tuple(ModuleShape(name, 8, 8) for name in names)
    values = make_method("prilora", {}).score({}, ScoringContext(shapes, 8, 0)).values
    thirds = [1.0, 1.0 + 2 / 3, 1.0 + 4 / 3, 3.0]
    assert list(values.values()) == pytest.approx([*thirds, 1.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    falling = make_method("prilora", {"last_to_first": 0.25}).score({}, ScoringContext(shapes[:4], 8, 0)).values
    assert list(falling.values()) == pytest.approx([1.0, 0.75, 0.5, 0.25])
