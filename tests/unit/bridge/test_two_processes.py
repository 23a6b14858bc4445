"""Two processes of one job: they agree or stop together, before any process group exists and any model is loaded.

Where they stand for nodes that share no folder, each has a working directory of its own.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive import files
from llamafactory_adaptive.training.checkpoint_files import write_layout
from tests.helpers.tiny import settings
from tests.helpers.workers import said_by_two


HOST = socket.gethostname()
REMEDY = "copy the checkpoints of rank 0 there, or use a folder all nodes share"


def stand_on_node(rank: int, root: Path) -> None:
    """Be the only process of a node: its folder is the working directory."""
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(root / f"node{rank}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for rank in range(2):
        (tmp_path / f"node{rank}" / "out").mkdir(parents=True)
    return tmp_path


def save_checkpoint(node: Path, step: int = 3) -> Path:
    """As much of a sealed checkpoint as is looked at before a model is loaded."""
    folder = node / "out" / f"checkpoint-{step}"
    folder.mkdir()
    (folder / files.PLAN_FILE).write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"w": torch.ones(4)}, folder / "adapter_model.safetensors")
    files.write_digests(folder)
    return folder


# -- the checkpoint ---------------------------------------------------------------------------------------------------
def choose(rank: int, root: Path, more: dict[str, Any]) -> Path | None:
    from llamafactory_adaptive.bridge.resuming import checkpoint_to_resume

    stand_on_node(rank, root)
    return checkpoint_to_resume({"output_dir": "out", **more})


def damage(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("{}")


CHOSEN = "out/checkpoint-3"
NAMED = {"resume_from_checkpoint": CHOSEN}


@pytest.mark.parametrize("more", [{}, NAMED], ids=["newest", "named"])
def test_a_checkpoint_that_both_nodes_have_whole_is_resumed_from(root, more):
    for rank in range(2):
        save_checkpoint(root / f"node{rank}")
    assert said_by_two(choose, root, more) == [CHOSEN] * 2


@pytest.mark.parametrize("more", [{}, NAMED], ids=["newest", "named"])
def test_a_checkpoint_that_another_node_lacks_stops_both(root, more):
    save_checkpoint(root / "node0")
    said = f"rank 0 resumes from {CHOSEN}, which {HOST} does not have; {REMEDY}"
    assert said_by_two(choose, root, more) == [f"OtherProcessError: rank 1: {said}", f"PlanError: {said}"]


@pytest.mark.parametrize("more", [{}, NAMED], ids=["newest", "named"])
def test_a_checkpoint_that_is_damaged_on_another_node_stops_both(root, more):
    save_checkpoint(root / "node0")
    damage(save_checkpoint(root / "node1"))
    fault = "trainer_state.json has changed since it was written"
    said = f"rank 0 resumes from {CHOSEN}, which is damaged on {HOST} ({fault}); {REMEDY}"
    assert said_by_two(choose, root, more) == [f"OtherProcessError: rank 1: {said}", f"PlanError: {said}"]


def test_a_node_that_alone_has_a_checkpoint_does_not_resume_alone(root):
    save_checkpoint(root / "node1")
    said = (f"{HOST} has {CHOSEN} to resume from and rank 0 has nothing; {REMEDY}, or start afresh with "
            "overwrite_output_dir: true")  # fmt: skip
    assert said_by_two(choose, root, {}) == [f"OtherProcessError: rank 1: {said}", f"PlanError: {said}"]
    assert said_by_two(choose, root, {"overwrite_output_dir": True}) == ["None"] * 2


def test_rank_0_chooses_for_all(root):
    for rank in range(2):
        save_checkpoint(root / f"node{rank}")
    save_checkpoint(root / "node1", step=6)
    assert said_by_two(choose, root, {}) == [CHOSEN] * 2


@pytest.mark.parametrize(
    ("there", "here", "more"), [(2, 3, {}), (3, 2, NAMED), (1, 2, {}), (2, None, NAMED), (None, 3, {})]
)
def test_another_zero_stage_than_the_checkpoints_stops_both(root, more, there, here):
    for rank in range(2):
        folder = save_checkpoint(root / f"node{rank}")
        write_layout(folder, {"deepspeed_stage": there, "round_robin_gradients": False, "processes": 2})
    deepspeed = {"deepspeed": {"zero_optimization": {"stage": here}}} if here else {}
    said = (f"{CHOSEN} was written under another layout: deepspeed_stage is {there} there and {here} here; set "
            "deepspeed and the number of processes back, or use another output_dir")  # fmt: skip
    outcomes = said_by_two(choose, root, {**more, **deepspeed})
    assert outcomes == [f"PlanError: {said}", f"OtherProcessError: rank 0: {said}"]


def test_the_same_zero_stage_goes_on(root):
    for rank in range(2):
        layout = {"deepspeed_stage": 3, "round_robin_gradients": False, "processes": 2}
        write_layout(save_checkpoint(root / f"node{rank}"), layout)
    assert said_by_two(choose, root, {"deepspeed": {"zero_optimization": {"stage": 3}}}) == [CHOSEN] * 2


# -- plan and settings ------------------------------------------------------------------------------------------------
REACHED = "the host was reached, which loads the model"


class ReachedError(Exception):
    """Raised where the host would begin."""


def begin_training(rank: int, root: Path, base: Path, data: Path, more: list[dict[str, Any]]) -> str:
    """Up to where the host would take over."""
    from llamafactory_adaptive.bridge.training_run import adaptive_training_function

    def host(config: dict[str, Any]) -> None:
        raise ReachedError

    stand_on_node(rank, root)
    given = settings(base, data, Path("out"), adaptive_plan="plan.json", **more[rank])
    given = {key: value for key, value in given.items() if not key.startswith("adaptive_calibration")}
    try:
        adaptive_training_function(host, lambda: None)({"args": given})
    except ReachedError:
        return REACHED
    return "neither an error nor the host"


@pytest.fixture
def begin(root, tiny_llama, data_dir):
    """A job whose nodes have plans drawn with these seeds, and these settings on top of the others."""

    def both(seeds: list[int], more: list[dict[str, Any]]) -> list[str]:
        from llamafactory_adaptive.bridge.checked_run import checked_run
        from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
        from llamafactory_adaptive.planning.sources import fresh_plan

        for rank, seed in enumerate(seeds):
            args = settings(tiny_llama, data_dir, root / "unused", adaptive_method="random")
            drawn = {key: value for key, value in args.items() if not key.startswith("adaptive_calibration")}
            drawn["adaptive_calibration_seed"] = seed
            run = checked_run(drawn, host_too=False)
            fresh_plan(run.config, LlamaFactoryRun(run)).plan.save(root / f"node{rank}" / "plan.json")
        return said_by_two(begin_training, root, tiny_llama, data_dir, more)

    return both


def test_nodes_with_one_plan_and_the_same_settings_go_on_to_the_host(begin):
    assert begin([1, 1], [{}, {}]) == [REACHED] * 2


def test_another_plan_on_one_node_stops_both_before_the_model_is_loaded(begin):
    said = ("GuardError: ranks [1] hold another plan than rank 0 (nodes that score for themselves can differ in the "
            "last bit): write one with `llamafactory-adaptive plan`, copy it to every node and set "
            "adaptive_plan")  # fmt: skip
    assert begin([1, 2], [{}, {}]) == [said] * 2


def test_other_settings_on_one_node_stop_both_before_the_model_is_loaded(begin):
    said = begin([1, 1], [{}, {"adaptive_max_nonfinite_steps": 7}])
    assert said == ["GuardError: ranks [1] were given other adaptive settings than rank 0"] * 2
