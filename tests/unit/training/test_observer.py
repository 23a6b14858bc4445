"""What a method is shown at each step, the training gradient, that of a path or nothing, and where on the path."""

from types import SimpleNamespace

import pytest
import torch

from llamafactory_adaptive.methods.igu import Igu, IguOptions
from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
from llamafactory_adaptive.training.observer import Observer
from llamafactory_adaptive.training.path_probe import Prober
from llamafactory_adaptive.training.run_log import Counters
from tests.helpers.dynamic import batch, scatter, stream, triplet_model


SEED = 5


def observing(accumulation=1, fp16=False, **options):
    """An observer of a tiny model whose adapter matters; the same at every call."""
    model, triplets, components = triplet_model()
    scatter(triplets)
    arguments = SimpleNamespace(fp16=fp16, average_tokens_across_devices=False, device=torch.device("cpu"))
    trainer = SimpleNamespace(model=model, args=arguments, current_gradient_accumulation_steps=accumulation)
    method = Igu(IguOptions("published", orthogonality="none", **options))
    return Observer(method, components, trainer, Counters(), SEED, None)


def put_gradients(observer):
    """Random gradients where a backward pass would leave them; weights stay."""
    generator = torch.Generator().manual_seed(1)
    for parameter in observer.components.parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def state_after(observer, see):
    see(observer.components, observer.method)
    return observer.method.state()


def equal(first, second):
    return first.keys() == second.keys() and all(torch.allclose(first[key], second[key]) for key in first)


def test_every_micro_batch_runs_where_the_method_puts_it_until_ranks_are_final():
    observer = observing()
    factors = []
    for step in range(3):
        observer.begin(step, final=False)
        factors.append(observer.position.factor)
        for _ in range(2):
            observer.next_micro_batch(final=False)
            factors.append(observer.position.factor)
    positions = [observer.method.position(SEED, step, micro) for step in range(3) for micro in range(3)]
    assert factors == [a**3 for a in positions]
    assert len(set(factors)) > 3
    observer.begin(3, final=True)
    assert observer.position.factor == 1.0


def test_without_a_path_the_method_sees_the_training_gradient():
    observer = observing(importance="off")
    put_gradients(observer)
    observer.begin(0, final=False)
    observer.before_step(final=False)
    twin = observing(importance="off")
    put_gradients(twin)
    assert equal(
        observer.method.state(), state_after(twin, lambda components, method: components.update(method, None))
    )
    assert (observer.counters.observations, observer.counters.probes) == (1, 0)


def test_after_the_final_allocation_nothing_is_observed():
    for options in ({"importance": "off"}, {"importance": "integrated"}):
        observer = observing(**options)
        put_gradients(observer)
        observer.begin(0, final=True)
        observer.before_step(final=True)
        assert observer.method.state() == {}
        assert (observer.counters.observations, observer.counters.probes) == (0, 0)


def test_a_probed_step_shows_the_gradient_of_the_path_and_leaves_that_of_training():
    observer = observing(importance="integrated")
    observer.begin(0, final=False)
    observer.trainer.model(**batch())  # the first micro-batch, which is kept
    put_gradients(observer)
    before = [parameter.grad.clone() for parameter in observer.components.parameters]
    observer.before_step(final=False)
    assert all(torch.equal(p.grad, old) for p, old in zip(observer.components.parameters, before, strict=True))
    twin = observing(importance="integrated")
    prober = Prober(twin.trainer.model, twin.components, SEED)
    prober.inputs = batch()
    gradients = prober.gradients(twin.method.path(SEED, 0))
    expected = state_after(twin, lambda components, method: components.observe_given(method, gradients))
    assert equal(observer.method.state(), expected)
    assert (observer.counters.observations, observer.counters.probes) == (1, 1)


def test_a_loss_over_the_tokens_of_the_whole_step_is_brought_back_to_the_mean_of_the_kept_batch():
    states = []
    for accumulation, tokens_of_step in ((1, 1), (4, 4)):
        observer = observing(accumulation, importance="integrated")
        kept = batch()
        tokens = int((kept["labels"][:, 1:] != -100).sum())
        observer.begin(0, final=False)
        observer.trainer.model(**kept, num_items_in_batch=tokens * tokens_of_step)
        put_gradients(observer)
        observer.before_step(final=False)
        states.append(observer.method.state())
    assert equal(*states)


def test_steps_between_probes_show_nothing_and_keep_no_batch():
    observer = observing(importance="integrated", probe_interval=2)
    put_gradients(observer)
    observer.begin(1, final=False)
    observer.trainer.model(**batch())
    observer.before_step(final=False)
    assert observer.prober.inputs is None
    assert observer.method.state() == {}
    assert (observer.counters.observations, observer.counters.probes) == (0, 0)


def test_a_probe_that_does_not_fit_the_limit_on_overhead_waits():
    observer = observing(importance="integrated")
    put_gradients(observer)
    observer.probe_budget.next_step = 4
    for step, probes in ((3, 0), (4, 1)):
        observer.begin(step, final=False)
        observer.trainer.model(**batch())
        observer.before_step(final=False)
        assert observer.counters.probes == probes


@pytest.mark.parametrize("fp16", [False, True])
def test_infinite_gradients_are_passed_over_only_where_a_loss_scaler_skips_the_step(fp16):
    observer = observing(fp16=fp16, importance="off")
    put_gradients(observer)
    for parameter in observer.components.parameters:
        parameter.grad[0] = float("inf")
    observer.begin(0, final=False)
    observer.before_step(final=False)
    finite = all(bool(value.isfinite().all()) for value in observer.method.state().values())
    assert finite is fp16


def test_seconds_are_given_once(monkeypatch):
    """A clock of our own: observing takes 3 s."""
    observer = observing(importance="off")
    now = [0.0]
    monkeypatch.setattr("llamafactory_adaptive.training.observer.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(observer.components, "update", lambda *_, **__: now.__setitem__(0, now[0] + 3.0))
    next(stream(observer.components.triplets, 1))
    observer.begin(0, final=False)
    observer.before_step(final=False)
    assert [observer.take_seconds(), observer.take_seconds()] == [3.0, 0.0]


# -- gradients of single samples -------------------------------------------------------------------------------------


def by_samples(sensitivity="weight_gradient", fp16=False):
    """An observer of a tiny model in the form of TsqLoRA, without lambda; and its rows, three of them."""
    model, triplets, components = triplet_model(initial_lambda=None)
    scatter(triplets)
    trainer = SimpleNamespace(model=model.eval(), args=SimpleNamespace(fp16=fp16, device=torch.device("cpu")))
    return Observer(Tsq(TsqOptions(sensitivity=sensitivity)), components, trainer, Counters(), SEED, None)


@pytest.mark.parametrize("sensitivity", ["weight_gradient", "fisher"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_sensitivity_is_the_mean_of_its_samples(sensitivity, scale):
    """``sum_i |w s_i|`` and ``n sum_i s_i^2``, by a backward pass per sample; a loss scale is taken out."""
    observer = by_samples(sensitivity, fp16=scale != 1.0)
    observer.components.engine.loss_scale = lambda: scale
    whole = batch()
    labelled = (whole["labels"][:, 1:] != -100).sum(1)
    expected: dict[str, torch.Tensor] = {}
    for row in range(3):
        observer.trainer.model.zero_grad()
        single = {name: values[row : row + 1] for name, values in whole.items()}
        (observer.trainer.model(**single).loss * (labelled[row] / labelled.sum())).backward()
        for block in observer.components.blocks:
            w, g = (torch.cat([t.flatten() for t in part]) for part in
                    (block.parameters, [p.grad for p in block.parameters]))  # fmt: skip
            term = 3 * g.square() if sensitivity == "fisher" else (w * g).abs()
            means_Mr = observer.components.by_component(block, term.detach())
            expected[f"total.{block.name}"] = expected.get(f"total.{block.name}", 0.0) + means_Mr
    observer.trainer.model.zero_grad()
    observer.begin(0, final=False)
    (observer.trainer.model(**whole).loss * scale).backward()
    observer.before_step(final=False)
    found = observer.method.state()
    assert all(torch.allclose(found[name], values, rtol=1e-4, atol=1e-10) for name, values in expected.items())
    assert observer.counters.observations == 1
    observer.begin(1, final=True)
    observer.trainer.model(**whole).loss.backward()
    observer.before_step(final=True)
    assert equal(observer.method.state(), found), "nothing is observed once ranks are final"
    assert observer.counters.observations == 1


def test_infinite_gradients_of_samples_are_passed_over_where_a_loss_scaler_skips_the_step():
    observer = by_samples(fp16=True)
    observer.begin(0, final=False)
    (observer.trainer.model(**batch()).loss * float("inf")).backward()
    observer.before_step(final=False)
    assert all(bool(value.isfinite().all()) for value in observer.method.state().values())
