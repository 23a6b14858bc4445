"""Workers of Ray: one plan for all, the ranks of any other launcher, and errors that a user can read."""

import json
import sys

import pytest
import yaml

from llamafactory_adaptive.planning.cache import CACHE_ENV
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.commands import begin, ended
from tests.helpers.processes import ROOT
from tests.helpers.tiny import pruning_settings, settings
from tests.helpers.training import adapters_equal
from tests.helpers.workers import train_on_two


pytest.importorskip("ray")
pytestmark = pytest.mark.slow

CLUSTER = {
    "master_addr": "127.0.0.1",
    "ray_init_kwargs": {"num_cpus": 20, "include_dashboard": False, "_node_ip_address": "127.0.0.1"},
}
# Ray lowers the priority of its workers, which then wait behind all else that a machine does.
QUIET = {"USE_RAY": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def train(tmp_path):
    def run(args, workers, expect=0):
        path = tmp_path / "x.yaml"
        path.write_text(yaml.safe_dump({**args, **CLUSTER}))
        cache = tmp_path / f"cache{workers}"
        words = (sys.executable, ROOT / "tests/helpers/ray_on_cpus.py", "train", path)
        return ended(begin(*words, f"ray_num_workers={workers}", **QUIET, **{CACHE_ENV: str(cache)}), expect), cache

    return run


def test_two_workers_train_on_the_plan_that_the_first_one_made(train, tmp_path, tiny_llama, data_dir):
    done, cache = train(settings(tiny_llama, data_dir, tmp_path / "ray"), 2)
    assert len(list((cache / "plans").glob("*.json"))) == 1
    plan = load_plan(tmp_path / "ray" / "adaptive_rank_plan.json")
    config = json.loads((tmp_path / "ray" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {m.name: m.rank for m in plan.active}
    train_on_two(settings(tiny_llama, data_dir, tmp_path / "torchrun"), tmp_path / "logs")
    assert adapters_equal(tmp_path / "ray", tmp_path / "torchrun")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_finds_the_ranks_that_it_finds_under_torchrun(train, tmp_path, tiny_llama, data_dir, workers):
    train(pruning_settings(tiny_llama, data_dir, tmp_path / "ray"), workers)
    args = pruning_settings(tiny_llama, data_dir, tmp_path / "other")
    if workers == 2:
        train_on_two(args, tmp_path / "logs")
    else:
        from llamafactory.train.tuner import run_exp

        run_exp(args)
    ours, theirs = (load_plan(tmp_path / name / "adaptive_rank_plan.json") for name in ("ray", "other"))
    assert [m.rank for m in ours.modules] == [m.rank for m in theirs.modules]
    assert adapters_equal(tmp_path / "ray", tmp_path / "other")


def test_an_error_of_the_first_worker_is_one_message_and_exit_code_2(train, tmp_path, tiny_llama, data_dir):
    done, _ = train(settings(tiny_llama, data_dir, tmp_path / "ray", lora_target="nowhere"), 2, expect=2)
    said = done.stdout + done.stderr
    assert said.count("llamafactory-adaptive: error: ") == 1, said[-3000:]
    assert "nowhere" in said
    assert not (tmp_path / "ray" / "adapter_config.json").exists()
