"""Every static method of the registry under one contract; Sensitivity-LoRA against its NumPy reference."""

import dataclasses

import numpy as np
import pytest
import torch

from llamafactory_adaptive.calibration.batches import make_batches
from llamafactory_adaptive.errors import CalibrationError
from llamafactory_adaptive.methods import ScoringContext, is_dynamic
from llamafactory_adaptive.methods._registry import get_method, methods
from llamafactory_adaptive.methods.sensitivity import Sensitivity, SensitivityOptions
from llamafactory_adaptive.ranks.plan import ModuleShape
from tests.helpers import reference
from tests.helpers.inputs import captured_inputs, targets
from tests.helpers.tiny import ARCHITECTURES, rows, tiny_model


def context(model, seed=5):
    shapes = tuple(ModuleShape(n, m.in_features, m.out_features) for n, m in targets(model).items())
    return ScoringContext(shapes, lora_rank=8, seed=seed)


REQUIRED = {"by_type": {"ranks": "q_proj:4,down_proj:16"}}  # options without which a method cannot run


def variants():
    for name in methods():
        if is_dynamic(get_method(name)):
            continue  # test_dynamic_methods.py
        yield pytest.param(name, REQUIRED.get(name, {}), id=name)
    yield pytest.param("sensitivity", {"weighting": "gradient"}, id="sensitivity-gradient")


def score(name, options, model, data, batch_size=3, pad_id=0):
    method = get_method(name)(get_method(name).Options(**options))
    measurement = method.measurement()
    statistics = measurement(model, targets(model), make_batches(data, batch_size, pad_id)) if measurement else {}
    return method.score(statistics, context(model)).values


class TestContract:
    """What a new method gets for free."""

    @pytest.mark.parametrize("architecture", list(ARCHITECTURES))
    @pytest.mark.parametrize(("name", "options"), list(variants()))
    def test_scores_are_finite_complete_and_deterministic(self, name, options, architecture):
        model = tiny_model(architecture)
        first, second = (score(name, options, model, rows(7)) for _ in range(2))
        assert list(first) == list(targets(model))
        assert all(np.isfinite(v) and v >= 0 for v in first.values())
        assert sum(first.values()) > 0
        assert first == second

    @pytest.mark.parametrize(("name", "options"), list(variants()))
    def test_padding_and_batch_split_do_not_matter(self, name, options):
        model, data = tiny_model(), rows(9)
        expected = score(name, options, model, data, batch_size=1)  # one row a batch: no padding at all
        for batch_size, pad_id in ((4, 0), (9, 7), (9, 200)):
            scores = score(name, options, model, data, batch_size, pad_id)
            assert scores == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("failing", [False, True])
    @pytest.mark.parametrize(("name", "options"), list(variants()))
    def test_the_model_is_left_as_it_was(self, name, options, failing):
        model = tiny_model()
        model.train()
        model.lm_head.eval()
        model.model.embed_tokens.weight.requires_grad_(False)
        flags = {n: m.training for n, m in model.named_modules()}
        trainable = {n: p.requires_grad for n, p in model.named_parameters()}
        data = rows(5)
        if failing:
            data[2]["input_ids"][0] = 10_000  # outside the vocabulary
        try:
            score(name, options, model, data)
        except IndexError:
            assert failing
        assert {n: m.training for n, m in model.named_modules()} == flags
        assert {n: p.requires_grad for n, p in model.named_parameters()} == trainable
        assert all(p.grad is None for p in model.parameters())
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
        assert not any(getattr(m, kind) for m in model.modules() for kind in hooks)


def test_theta_of_the_paper_matches_the_numpy_reference():
    model, data = tiny_model(), rows(8)
    lams = {n: x.square().mean(0).numpy() for n, x in captured_inputs(model, data).items()}
    scores = score("sensitivity", {"transform": "none"}, model, data)
    assert np.allclose(list(scores.values()), reference.theta(list(lams.values())), rtol=1e-5)
    scores = score("sensitivity", {"transform": "none", "top_fraction": 1 / 3, "energy": 0.8}, model, data)
    assert np.allclose(
        list(scores.values()), reference.theta(list(lams.values()), fraction=1 / 3, energy=0.8), rtol=1e-5
    )


def test_modules_that_read_one_input_tie_unless_gradients_weigh():
    model, data = tiny_model(), rows(6)
    plain = score("sensitivity", {}, model, data)
    weighed = score("sensitivity", {"weighting": "gradient"}, model, data)
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    assert plain[q] == plain[k]
    assert weighed[q] != weighed[k]


LAMBDAS = {
    f"m.layers.{i}.{t}": torch.rand(12, dtype=torch.float64) * (1 + i) for i in range(3) for t in ("q_proj", "up")
}
SHAPES = ScoringContext(tuple(ModuleShape(n, 12, 12) for n in LAMBDAS), lora_rank=8, seed=0)


def from_lambdas(**options):
    return Sensitivity(SensitivityOptions(**options)).score(LAMBDAS, SHAPES)


def test_ablations_each_change_the_scores():
    results = [
        tuple(from_lambdas(**options).values.values())
        for options in (
            {},
            {"metric": "global"},
            {"metric": "local"},
            {"combination": "equal"},
            {"top_fraction": 1 / 3, "energy": 0.8},
            {"transform": "none"},
            {"transform": "per_type"},
            {"allocation": "pra"},
        )
    ]
    assert len(set(results)) == len(results)


def test_global_alone_is_proportional_to_the_trace():
    values = from_lambdas(metric="global", transform="none")
    trace = np.array([float(v.sum()) for v in LAMBDAS.values()])
    assert np.allclose(np.array(list(values.values.values())) / trace, values.values[next(iter(LAMBDAS))] / trace[0])
    assert list(values.metrics["trace"].values()) == pytest.approx(trace)


def test_pra_gives_classes_above_at_and_below_the_budget():
    scores = from_lambdas(allocation="pra", classes=3)
    order = sorted(LAMBDAS, key=lambda name: -scores.metrics["theta"][name])
    assert [scores.values[name] for name in order] == [9, 9, 8, 8, 7, 7]
    assert sum(scores.values.values()) == 8 * len(LAMBDAS)


def test_all_equal_metrics_weigh_all_modules_the_same():
    same = {name: torch.ones(12, dtype=torch.float64) for name in LAMBDAS}
    assert set(Sensitivity(SensitivityOptions()).score(same, SHAPES).values.values()) == {1.0}


def test_random_draws_follow_the_seed():
    method = get_method("random")(get_method("random").Options())
    model = tiny_model()
    assert method.score({}, context(model, 1)) == method.score({}, context(model, 1))
    assert method.score({}, context(model, 1)) != method.score({}, context(model, 2))


def test_every_option_has_help_and_a_default():
    for name in methods():
        for entry in dataclasses.fields(get_method(name).Options):
            assert entry.metadata["help"]
            assert entry.default is not dataclasses.MISSING


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda value: value * float("nan"), "NaN or infinity for m1"),
        (lambda value: -value, "negative second moments for m1"),
        (torch.zeros_like, "zeros only for m1"),
    ],
)
@pytest.mark.parametrize("allocation", ["sra", "pra"])
def test_statistics_that_are_none_never_become_uniform_ranks(spoil, words, allocation) -> None:
    shapes = tuple(ModuleShape(name, 8, 8) for name in ("m0", "m1", "m2"))
    statistics = {shape.name: torch.rand(8, generator=torch.Generator().manual_seed(i)) + 0.1
                  for i, shape in enumerate(shapes)}  # fmt: skip
    method, context = Sensitivity(SensitivityOptions(allocation=allocation)), ScoringContext(shapes, 4, 0)
    assert len(set(method.score(statistics, context).values.values())) > 1
    with pytest.raises(CalibrationError, match=words):
        method.score({**statistics, "m1": spoil(statistics["m1"])}, context)
