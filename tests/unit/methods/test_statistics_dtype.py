"""S and U that are kept in bfloat16: half the memory, nearly the scores, and a resume that goes on exactly."""

import itertools

import pytest
import torch

from llamafactory_adaptive.methods._running_stats import SmoothedImportance
from llamafactory_adaptive.methods.adalora import AdaloraOptions
from llamafactory_adaptive.methods.elalora import ElaloraOptions
from llamafactory_adaptive.methods.igu import IguOptions
from tests.helpers.searches import rank_search, trainer_of
from tests.helpers.tiny import tiny_model


def observations(count, elements=4000):
    """Importances whose sizes differ by element, and from step to step."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-8, 0, elements)
    return [sizes * torch.empty(elements).exponential_(generator=generator) for _ in range(count)]


def smoothed(dtype, seen):
    made = SmoothedImportance(0.85, 0.85, dtype)
    for importance in seen:
        made.update("x", importance.clone())
    return made


def test_half_the_bytes_hold_nearly_the_same():
    """Over 200 steps errors do not add up: each is forgotten at the rate at which the mean forgets."""
    exact, coarse = (smoothed(dtype, observations(200)) for dtype in ("float32", "bfloat16"))
    for name, values in coarse.state().items():
        assert values.dtype == torch.bfloat16
        assert values.nbytes * 2 == exact.state()[name].nbytes
        error = (values.float() - exact.state()[name]).abs() / exact.state()[name]
        assert error.mean() < 0.01
        assert error.max() < 0.05
    for score in (lambda s: s.product("x"), lambda s: s.snr("x", 1e-6), lambda s: s.discounted("x")):
        assert score(coarse).dtype == torch.float32
        assert torch.allclose(score(coarse), score(exact), rtol=0.1)
    assert torch.allclose(coarse.log_sum("x"), exact.log_sum("x"), rtol=1e-2)


def test_a_resume_goes_on_exactly_and_what_is_forgotten_or_not_observed_stays_so():
    seen, where = observations(9), (torch.arange(4000) % 2).float()
    whole, resumed = smoothed("bfloat16", seen[:4]), SmoothedImportance(0.85, 0.85, "bfloat16")
    resumed.load({name: value.clone() for name, value in smoothed("bfloat16", seen[:4]).state().items()})
    for made, importance in itertools.product((whole, resumed), seen[4:]):
        made.update("x", importance.clone())
    assert all(torch.equal(value, resumed.state()[name]) for name, value in whole.state().items())
    before = whole.mean["x"].clone()
    whole.update("x", seen[0].clone(), where)
    assert torch.equal(whole.mean["x"][::2], before[::2])
    assert not torch.equal(whole.mean["x"], before)
    whole.forget("x", where)
    assert not whole.mean["x"][1::2].any()
    assert whole.mean["x"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "options"),
    [("adalora", {}), ("elalora", {"exchanged_ranks": 2}), ("igu", {"uncertainty": "product", "importance": "off"})],
)
def test_ranks_of_a_search_are_nearly_the_same(method, options, tmp_path):
    found, states = {}, {}
    for dtype in ("float32", "bfloat16"):
        search = rank_search(tiny_model(), method, lora_rank=2, interval=2, statistics_dtype=dtype, **options)
        trainer = trainer_of(search, tmp_path / dtype, max_steps=12)
        trainer.train()
        trainer.save_model(str(tmp_path / dtype))
        states[dtype] = search.callback.bound.search.request.method.state()
        found[dtype] = search.finalize(tmp_path / dtype).ranks()
    assert {value.dtype for value in states["bfloat16"].values()} == {torch.bfloat16}
    moved = sum(abs(rank - found["bfloat16"][name]) for name, rank in found["float32"].items())
    assert len(set(found["float32"].values())) > 1
    assert moved <= 2, "of 28 ranks at most one goes elsewhere"


@pytest.mark.parametrize("options", [AdaloraOptions, ElaloraOptions])
def test_decay_rates_whose_steps_would_be_rounded_off_are_refused(options):
    [problem] = options(beta1=0.99, statistics_dtype="bfloat16").check()
    assert problem.key == f"{options.__name__.removesuffix('Options').lower()}_beta1"
    assert "bfloat16 rounds off the small steps" in problem.allowed
    assert options(beta1=0.99).check() == options(beta1=0.95, beta2=0.5, statistics_dtype="bfloat16").check() == []


def test_such_a_rate_would_indeed_stand_still():
    """A mean that is at 1 does not reach 1.3, though every observation is 1.3."""
    slow = SmoothedImportance(0.999, 0.85, "bfloat16")
    slow.load({"mean.x": torch.ones(1, dtype=torch.bfloat16), "deviation.x": torch.ones(1, dtype=torch.bfloat16)})
    for _ in range(1000):
        slow.update("x", torch.full((1,), 1.3))
    assert slow.mean["x"] == 1.0


def test_a_type_without_effect_is_refused():
    [problem] = IguOptions(uncertainty="mean", statistics_dtype="bfloat16").check()
    assert (problem.key, problem.suggestion) == (
        "igu_statistics_dtype", "leaving igu_statistics_dtype out, or igu_uncertainty: product")  # fmt: skip
    [problem] = IguOptions(uncertainty="product", beta2=0.99, statistics_dtype="bfloat16").check()
    assert problem.key == "igu_beta2"
