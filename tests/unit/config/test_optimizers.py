"""Optimizers that a search can go with: by name before a run, by class in one, and what is said of the others."""

import pytest
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from llamafactory_adaptive.config.search_conflicts import _ELEMENTWISE_OPTIMIZERS, check_search_conflicts
from llamafactory_adaptive.engines.optimizer_state import keeps_known_states
from llamafactory_adaptive.methods import make_method


MENDED = {"importance": "shrink", "mend_strength": True}
ZERO = {"returns": "zero"}


def test_an_optimizer_is_accepted_by_name_if_its_class_is(tmp_path):
    args, compared = TrainingArguments(str(tmp_path), use_cpu=True), set()
    for name in OptimizerNames:
        args.optim = name
        try:
            kind, _ = Trainer.get_optimizer_cls_and_kwargs(args)
        except (ImportError, ValueError, RuntimeError):  # of a package that is not installed here
            continue
        compared.add(name.value)
        assert keeps_known_states(object.__new__(kind)) is (name.value in _ELEMENTWISE_OPTIMIZERS), name
    assert compared >= {"adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"}
    assert {name.value for name in OptimizerNames} >= _ELEMENTWISE_OPTIMIZERS


@pytest.mark.parametrize(
    ("method", "options", "cause", "remedy"),
    [
        ("tsq", {}, "components that come back need fresh optimizer states", "tsq_reallocation: false"),
        ("igu", ZERO, "components that come back with lambda zero need", "igu_returns: none"),
        ("igu", MENDED, "mending the strength of the adapter for good scales", "leaving igu_mend_strength out"),
        ("igu", {**MENDED, **ZERO}, "lambda zero need fresh optimizer states and mending the strength",
         "igu_returns: none and leaving igu_mend_strength out"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("flat", [{"optim": "adafactor"}, {"use_muon": True}, {"deepspeed": {"x": 1}}], ids=str)
def test_a_refused_optimizer_is_told_why_and_the_way_out(flat, method, options, cause, remedy):
    (problem,) = check_search_conflicts(flat, make_method(method, options))
    assert cause in problem.allowed
    assert problem.suggestion.endswith(f", or {remedy}")


def test_methods_that_leave_optimizer_states_alone_go_with_any_optimizer():
    for method, options in (
        ("adalora", {}),
        ("igu", {}),
        ("igu", {"variant": "published"}),
        ("igu", {"importance": "shrink"}),
    ):
        assert check_search_conflicts({"optim": "adafactor"}, make_method(method, options)) == []
