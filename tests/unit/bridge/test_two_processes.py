"""Two processes of one job get one plan or stop together, before any process group exists and any model is loaded.

They stand for nodes that share no folder: each has a home, a cache and a working directory of its own.
"""

import io
import json
import os
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive import files
from llamafactory_adaptive.errors import CalibrationError, PlanError
from llamafactory_adaptive.ranks.plan import RankPlan, load_plan
from tests.helpers.nodes import CHOSEN, make_nodes, save_checkpoint, stand_on_node
from tests.helpers.tiny import settings
from tests.helpers.workers import said_by_two


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_nodes(tmp_path)


REACHED = "the host was reached, which loads the model, with"


class ReachedError(Exception):
    """Raised where the host would begin."""


def measure(run: Any, measurement: Any, path: Path) -> None:
    """In place of a process that loads the model: later modules score more."""
    if int(os.environ["RANK"]) != 0:
        raise AssertionError("only rank 0 measures")
    if run.run.args["seed"] == FAILS:
        raise CalibrationError("out of memory while scoring")
    facts = {"seconds": "0.1", "tokens": "10", "samples": "2", "rows_sha256": "0"}
    tensors = {shape.name: torch.full((shape.in_features,), 1.0 + 3 * i) for i, shape in enumerate(run.shapes)}
    save_file(tensors, path, metadata=facts)


FAILS = 666


def begin_training(rank: int, root: Path, base: Path, data: Path, more: list[dict[str, Any]]) -> str:
    """Up to where the host would take over, with the plan that it would be given."""
    from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
    from llamafactory_adaptive.bridge.training_run import adaptive_training_function
    from llamafactory_adaptive.training.current_run import current_run

    def host(config: dict[str, Any]) -> None:
        callback = current_run.get()
        assert callback is not None
        ranks = [module.rank for module in callback.guard.plan.modules]
        raise ReachedError(f"{REACHED} {callback.guard.plan.method} {ranks} from {callback.checkpoint}")

    stand_on_node(rank, root)
    LlamaFactoryRun.measure = measure  # type: ignore[method-assign]
    given = {key: value for key, value in settings(base, data, Path("out")).items() if "calibration" not in key}
    try:
        adaptive_training_function(host, lambda: None)({"args": {**given, "seed": 1, **more[rank]}})
    except ReachedError as reached:
        return str(reached)
    return "neither an error nor the host"


@pytest.fixture
def begin(root, tiny_llama, data_dir):
    """A job whose nodes have these settings on top of the others: the same for both, if there is one mapping."""

    def both(*more: dict[str, Any]) -> list[str]:
        return said_by_two(begin_training, root, tiny_llama, data_dir, [*more] * (2 // len(more)))

    return both


def check_agreed(said: list[str]) -> str:
    """Both nodes go on with one plan; what they said."""
    assert said[0] == said[1]
    assert said[0].startswith(REACHED)
    return said[0]


def caches(root: Path) -> list[list[str]]:
    """Names of the plans that each node's cache holds."""
    return [sorted(path.name for path in (root / f"node{rank}").rglob("plans/*.json")) for rank in range(2)]


def test_rank_0_alone_scores_and_its_plan_is_every_nodes(begin, root):
    said = check_agreed(begin({}))
    [[name], others] = caches(root)
    assert others == []
    assert len(set(load_plan(root / "node0" / "cache" / "plans" / name).ranks().values())) > 1
    assert check_agreed(begin({})) == said, "now from rank 0's cache"


@pytest.mark.parametrize(("method", "live"), [("igu", 8), ("tsq", 16)])
def test_a_search_starts_from_rank_0s_plan(method, live, begin):
    assert f" {method} [{live}, {live}, " in check_agreed(begin({"adaptive_method": method}))


def test_another_plan_in_the_cache_of_another_node_is_never_read(begin, root):
    said = check_agreed(begin({}))
    [[name], _] = caches(root)
    plan = load_plan(root / "node0" / "cache" / "plans" / name)
    other = root / "node1" / "cache" / "plans" / name
    replace(plan, modules=tuple(replace(module, rank=1) for module in plan.modules)).write(other)
    files.note_checksum(other)
    assert check_agreed(begin({})) == said


@pytest.mark.parametrize("method", ["sensitivity", "igu", "tsq"])
def test_the_checkpoint_of_rank_0_decides_what_is_resumed(method, begin, root, tiny_llama, data_dir):
    """Another node's copy has the weights; its plan is not read."""
    more = {"adaptive_method": method, "overwrite_output_dir": False}
    fresh = check_agreed(begin({**more, "output_dir": "elsewhere"}))
    for rank, broken in enumerate((False, True)):
        folder = save_checkpoint(root / f"node{rank}")
        plan = plan_of(method, root, tiny_llama, data_dir)
        (folder / files.PLAN_FILE).write_text("no plan at all" if broken else json.dumps(plan.to_json()))
        files.write_digests(folder)
    resumed = check_agreed(begin(more))
    assert resumed == fresh.replace("from None", f"from {CHOSEN}")


def plan_of(method: str, root: Path, base: Path, data: Path) -> RankPlan:
    """The plan that the nodes of `begin` agree on."""
    if method == "sensitivity":
        [[name], _] = caches(root)
        return load_plan(root / "node0" / "cache" / "plans" / name)
    from llamafactory_adaptive.bridge.checked_run import checked_run
    from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
    from llamafactory_adaptive.planning.sources import fresh_plan

    given = settings(base, data, root / "unused", adaptive_method=method, seed=1)
    run = checked_run({key: value for key, value in given.items() if "calibration" not in key}, host_too=False)
    return fresh_plan(run.config, LlamaFactoryRun(run)).plan


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"seed": FAILS}, "CalibrationError", "out of memory while scoring"),
        ({"adaptive_method": "igu", "lora_target": "nope"}, "AdaptiveConfigError", "lora_target: 'nope' is invalid: "),
        (
            {"adaptive_method": "tsq", "adaptive_plan": "none.json"},
            "AdaptiveConfigError",
            "adaptive_plan: 'none.json'",
        ),
    ],
)
def test_what_fails_on_rank_0_ends_every_node_with_its_message(more, kind, message, begin, root):
    first, second = begin(more)
    assert first.startswith(f"{kind}: {message}")
    assert second == f"OtherProcessError: rank 0: {first.removeprefix(f'{kind}: ')}"
    assert caches(root) == [[], []]


def test_a_given_plan_is_needed_on_rank_0s_node_alone(begin, root, tiny_llama, data_dir):
    plan_of("igu", root, tiny_llama, data_dir).save(root / "node0" / "plan.json")
    assert "[8, 8, " in check_agreed(begin({"adaptive_plan": "plan.json", "lora_rank": 8}))


def test_other_settings_on_one_node_stop_both_before_the_model_is_loaded(begin):
    said = begin({}, {"adaptive_max_nonfinite_steps": 7})
    assert said == ["GuardError: ranks [1] were given other adaptive settings than rank 0"] * 2


def test_settings_that_are_wrong_on_one_node_stop_both(begin):
    first, second = begin({}, {"adaptive_min_rank": 99})
    assert second.startswith("AdaptiveConfigError: adaptive_min_rank: 99 is invalid")
    assert first == f"OtherProcessError: rank 1: {second.removeprefix('AdaptiveConfigError: ')}"


# -- the end on a command line ----------------------------------------------------------------------------------------
def end_in_an_error(rank: int, root: Path) -> str:
    """What a worker of torchrun prints, and its exit code."""
    from llamafactory_adaptive.bridge.checked_run import CheckedRun, launched_run
    from llamafactory_adaptive.bridge.launch import with_clean_exit
    from llamafactory_adaptive.engines.distributed import from_main

    def refuse() -> None:
        raise PlanError("no plan here")

    stand_on_node(rank, root)
    launched_run.set(CheckedRun({"finetuning_type": "adaptive"}, {}, None))  # type: ignore[arg-type]
    with redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as caught:
        with_clean_exit(lambda args, callbacks: from_main("the plan", refuse))()
    return f"{caught.value.code}: {said.getvalue()}"


def test_the_message_of_rank_0_is_printed_once_on_every_node_with_exit_code_2(root):
    first, second = said_by_two(end_in_an_error, root)
    assert first == "2: llamafactory-adaptive: error: no plan here\n"
    assert second == "2: llamafactory-adaptive: error: rank 0: no plan here\n"
