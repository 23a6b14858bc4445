"""What a method declares of itself, what the protocols then ask of it, and what the registry refuses."""

import dataclasses
import inspect
import itertools
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from llamafactory_adaptive.errors import AdaptiveError
from llamafactory_adaptive.methods import (
    DynamicMethod,
    ExchangingMethod,
    MethodTraits,
    ProbingMethod,
    ReallocatingMethod,
    RelativeMethod,
    SamplingMethod,
    Scores,
    SpectralMethod,
    StaticMethod,
    _registry,
    get_method,
    is_dynamic,
    make_method,
)


@pytest.fixture
def register(monkeypatch):
    """Register a class under the name ``mine``, as an outside package would."""

    def under_mine(cls):
        module = ModuleType("my_package")
        module.Mine = cls
        monkeypatch.setitem(sys.modules, "my_package", module)
        entry = EntryPoint("mine", "my_package:Mine", _registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(_registry, "entry_points", lambda group: [entry])
        _registry.methods.cache_clear()

    yield under_mine
    _registry.methods.cache_clear()


def protocol_members(*protocols):
    """Names that protocols declare, read from the classes themselves."""
    parents = {part for protocol in protocols for part in inspect.getmro(protocol)}
    classes = [part for part in parents if part.__module__ == StaticMethod.__module__]
    names = {name for part in classes for name in (*vars(part), *vars(part).get("__annotations__", {}))}
    return {name for name in names if not name.startswith("_")}


PROTOCOLS = {
    "fixed": StaticMethod,
    "prune": DynamicMethod,
    "reallocate": ReallocatingMethod,
    "exchange": ExchangingMethod,
}
ALL_TRAITS = [
    MethodTraits(strategy, probes, relative, samples)
    for strategy, probes, relative, samples in itertools.product(PROTOCOLS, *3 * [(False, True)])
    if not ((probes or relative) and strategy == "fixed")
]


@pytest.mark.parametrize("traits", ALL_TRAITS, ids=str)
def test_traits_demand_the_members_of_their_protocols(traits):
    protocols = [PROTOCOLS[traits.strategy]]
    protocols += [ProbingMethod] if traits.probes else []
    protocols += [RelativeMethod] if traits.relative else []
    protocols += [SamplingMethod] if traits.samples else []
    assert {*traits.demanded(), "traits"} == protocol_members(*protocols)
    assert traits.dynamic == ("observe" in traits.demanded())


def test_a_method_of_singular_values_observes_nothing():
    traits = MethodTraits("prune", spectral=True)
    assert {*traits.demanded(), "traits"} == protocol_members(SpectralMethod)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("uniform", {}, MethodTraits("fixed")),
        ("random", {}, MethodTraits("fixed")),
        ("sensitivity", {}, MethodTraits("fixed")),
        ("svd", {}, MethodTraits("prune")),
        ("adalora", {}, MethodTraits("prune", scales_by_start=True)),
        ("adalora", {"scale": "lora_rank"}, MethodTraits("prune")),
        ("elalora", {}, MethodTraits("exchange")),
        ("igu", {}, MethodTraits("prune")),
        ("igu", {"importance": "off"}, MethodTraits("prune")),
        ("igu", {"importance": "integrated"}, MethodTraits("prune", probes=True)),
        ("igu", {"uncertainty": "snr"}, MethodTraits("prune", relative=True)),
    ],
)
def test_traits_of_the_built_in_methods(name, options, expected):
    traits = make_method(name, options).traits
    assert (traits.strategy, traits.probes, traits.samples) == (expected.strategy, expected.probes, expected.samples)
    assert is_dynamic(get_method(name)) == expected.dynamic


@pytest.mark.parametrize("reallocation", [True, False])
@pytest.mark.parametrize("sampling", [True, False])
def test_tsq_is_what_its_options_make_it(sampling, reallocation):
    traits = make_method("tsq", {"sampling": sampling, "reallocation": reallocation}).traits
    assert (traits.strategy, traits.samples) == ("reallocate" if reallocation else "fixed", sampling)
    assert is_dynamic(get_method("tsq"))


@pytest.mark.parametrize("name", _registry.methods())
def test_every_choice_of_a_registered_method_has_what_its_traits_demand(name):
    fields = dataclasses.fields(get_method(name).Options)
    for entry in fields:
        values = (True, False) if isinstance(entry.default, bool) else entry.metadata.get("choices") or ()
        for value in values:
            traits = make_method(name, {entry.name: value}).traits
            assert set(traits.only_with_plan) <= set(traits.read_with_plan) <= {field.name for field in fields}


# -- what is refused -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    searches: bool = False


class Mine:
    """A whole static method."""

    Options = Options
    concentration_advice = ""
    traits = MethodTraits("fixed")

    def __init__(self, options):
        self.options = options

    def measurement(self):
        return None

    def score(self, statistics, context):
        return Scores(dict.fromkeys((shape.name for shape in context.shapes), 1.0))


def without(*names, **more):
    """Mine, without some of its members and with others."""
    kept = {name: value for name, value in vars(Mine).items() if name not in names and not name.startswith("__d")}
    return type("Mine", (), {**kept, **more})


def test_a_whole_method_is_taken(register):
    register(Mine)
    assert get_method("mine") is Mine
    assert make_method("mine", {"searches": True}).options.searches


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (without("traits"),
         "it has no traits: declare traits = MethodTraits(strategy), with one of prune, reallocate, exchange, fixed"),
        (without(traits="fixed"), "it has no traits: declare traits = "),
        (without(traits=MethodTraits("pruning")),
         "its strategy is 'pruning', and must be one of prune, reallocate, exchange, fixed"),
        (without("Options"), "it lacks Options, the dataclass of its options"),
        (without("score"), "it lacks score, which its traits (strategy 'fixed') demand"),
        (without("score", "concentration_advice"), "it lacks concentration_advice, score, which its traits"),
        (without(traits=MethodTraits("fixed", samples=True)),
         "it lacks sampling, which its traits (strategy 'fixed', samples) demand"),
        (without(traits=MethodTraits("prune")),
         "it lacks initial_adapter, return_rule, shrinkage, orthogonality, position, observe, element_scores, state, "
         "load, which its traits (strategy 'prune') demand"),
        (without(traits=MethodTraits("reallocate", probes=True), **dict.fromkeys(
            ("initial_adapter", "return_rule", "shrinkage", "orthogonality", "position", "observe", "element_scores",
             "state", "load", "beta"))),
         "it lacks refresh_ratio, allocated, path, which its traits (strategy 'reallocate', probes) demand"),
        (without(traits=MethodTraits("prune", componentwise=True)),
         "it lacks initial_adapter, return_rule, shrinkage, orthogonality, position, state, load, importance_of, "
         "observe_components, component_scores, which its traits (strategy 'prune', componentwise) demand"),
        (without(traits=MethodTraits("exchange", componentwise=True)),
         "with componentwise no elements are observed, which its traits (strategy 'exchange', componentwise) need"),
    ],
)  # fmt: skip
def test_what_a_class_lacks_is_named_when_it_is_loaded(register, cls, said):
    register(cls)
    with pytest.raises(_registry.InvalidMethodError) as caught:
        get_method("mine")
    assert isinstance(caught.value, AdaptiveError)
    assert str(caught.value).startswith("the method 'mine' (my_package:Mine) cannot be used: ")
    assert said in str(caught.value)
    assert str(caught.value).endswith(" (docs/adding-a-method.md)")


def test_what_options_make_of_a_class_is_checked_when_it_is_made(register):
    traits = property(lambda self: MethodTraits("prune" if self.options.searches else "fixed"))
    register(without(traits=traits))
    get_method("mine")
    make_method("mine", {})
    with pytest.raises(_registry.InvalidMethodError, match=r"it lacks initial_adapter, .* demand"):
        make_method("mine", {"searches": True})
