"""The methods that docs/adding-a-method.md writes down do what it says."""

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import torch

from llamafactory_adaptive import calibration_batches, plan_ranks, score_modules
from llamafactory_adaptive.methods import _registry, make_method
from tests.helpers.dynamic import stream, triplet_model
from tests.helpers.tiny import rows, tiny_model


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
STATIC, DYNAMIC = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def written(monkeypatch):
    """Run code of the page in one module, and register its class as the page's entry point does."""
    module = ModuleType("my_package.my_method")
    for name in ("my_package", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    (target,) = re.findall(r'^my_method = "(.*)"$', PAGE, re.MULTILINE)
    assert target == f"{module.__name__}:MyMethod"
    entry = EntryPoint("my_method", target, _registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(_registry, "entry_points", lambda group: [entry])
    _registry.methods.cache_clear()

    def run(*blocks):
        for block in blocks:
            exec(block, vars(module))

    yield run
    _registry.methods.cache_clear()


def test_the_static_method_of_the_page_gives_ranks_by_the_trace(written):
    written(STATIC)
    model, batches = tiny_model(), calibration_batches(rows(6), batch_size=3)
    scores = score_modules(model, batches, method="my_method", power=2.0)
    expected = {name: float(values.sum()) ** 2 for name, values in scores.statistics.items()}
    assert scores.score().values == pytest.approx(expected)
    budget = plan_ranks(scores, lora_rank=4).budget()
    assert 0 < budget["used_parameters"] <= budget["asked_parameters"]


def test_the_dynamic_method_of_the_page_scores_the_largest_importance_seen(written):
    written(STATIC, DYNAMIC)
    _, triplets, components = triplet_model()
    method, seen = make_method("my_method", {}), []
    assert method.traits.strategy == "prune"
    for _ in stream(triplets, 3):
        seen.append([(m.a.lambda_r * m.a.lambda_r.grad).abs() for m in triplets.modules])
        components.update(method, None)
    (block,) = [block for block in components.blocks if block.kind == "lambda"]
    expected = torch.stack([torch.stack(values).max(0).values for values in zip(*seen, strict=True)])
    assert torch.equal(method.element_scores(block.name, components.weights(block)), expected.detach().reshape(-1))
    other = make_method("my_method", {})
    other.load(method.state())
    assert components.scores(other) == components.scores(method)
