"""Plans, cache entries and checkpoints that earlier versions wrote are read as they were meant.

The files of ``tests/data/before_rooms`` are of a tiny model: the cache after a run of sensitivity, and the checkpoint
of step 6 of a run of tsq. Nothing writes them again.
"""

import shutil
from pathlib import Path

import pytest

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.planning.cache import cached_plan, read_statistics
from llamafactory_adaptive.planning.earlier_plans import check_resumed_run
from llamafactory_adaptive.ranks.plan import ModuleShape, load_plan
from llamafactory_adaptive.training.checkpoint import read_state
from llamafactory_adaptive.training.sample_scores import read_terms
from tests.helpers.tiny import tsq_settings


EARLIER = Path(__file__).parents[1] / "data" / "before_rooms"
RANKS = (6, 6, 6, 1, 6, 5, 1, 5, 5, 5, 1, 5, 5, 1)
ROWS = "1b60449be6df2b23689b12a499a7772241cb4715ea9461b010b435e1cc206db2"


@pytest.fixture
def earlier(tmp_path):
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def test_a_cached_plan_and_its_statistics_are_used(earlier):
    plan = cached_plan(earlier / "cache" / "plan.json")
    assert tuple(module.rank for module in plan.modules) == RANKS
    shapes = [ModuleShape(module.name, module.in_features, module.out_features) for module in plan.modules]
    statistics, facts = read_statistics(earlier / "cache" / "statistics.safetensors", shapes)
    assert {name: len(statistics[name]) for name in statistics} == {s.name: s.in_features for s in shapes}
    assert facts["calibration_tokens"] > 0


def test_a_checkpoint_is_of_the_run_it_was_of(earlier, tiny_llama, data_dir, tmp_path):
    _bootstrap.install()
    from llamafactory_adaptive.bridge.validation import parse_config

    checkpoint = earlier / "checkpoint"
    plan = load_plan(checkpoint / "adaptive_rank_plan.json")
    assert sum(module.rank for module in plan.modules) == 69
    settings = tsq_settings(tiny_llama, data_dir, tmp_path / "out", max_steps=12, seed=3,
                            tsq_sensitivity_over="step")  # fmt: skip
    check_resumed_run(plan, parse_config(settings), str(checkpoint))
    tensors, document = read_state(checkpoint, partitioned=False)
    assert document["schema_version"] == 2
    assert tensors
    (terms,) = read_terms(checkpoint / "adaptive_quality.safetensors", ROWS)
    assert len(terms.loss) == 24
    assert terms.clusters is None, "earlier versions did not sort samples into clusters"
    assert read_terms(checkpoint / "adaptive_quality.safetensors", "of other rows") == []
