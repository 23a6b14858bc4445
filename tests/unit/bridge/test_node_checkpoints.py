"""Two processes of one job: they resume from rank 0's checkpoint or stop together, before any process group exists."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive import files
from llamafactory_adaptive.training.checkpoint_files import write_layout
from tests.helpers.nodes import CHOSEN, make_nodes, save_checkpoint, stand_on_node
from tests.helpers.workers import said_by_two


HOST = socket.gethostname()
REMEDY = "copy the checkpoints of rank 0 there, or use a folder all nodes share"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_nodes(tmp_path)


def choose(rank: int, root: Path, more: dict[str, Any]) -> Path | None:
    from llamafactory_adaptive.bridge.resuming import checkpoint_to_resume

    stand_on_node(rank, root)
    return checkpoint_to_resume({"output_dir": "out", **more})


def damage(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("{}")


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


@pytest.mark.parametrize("more", [{}, NAMED], ids=["newest", "named"])
def test_a_checkpoint_of_that_step_with_other_weights_on_another_node_stops_both(root, more):
    save_checkpoint(root / "node0")
    folder = save_checkpoint(root / "node1")
    save_file({"w": torch.zeros(4)}, folder / "adapter_model.safetensors")
    files.write_digests(folder)
    said = (f"{CHOSEN} holds another adapter on {HOST} than for rank 0; copy that of rank 0 there, or use a folder "
            "all nodes share")  # fmt: skip
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
    said = f"{CHOSEN} was written under another layout: deepspeed_stage is {there} there and {here} here; "
    first, second = said_by_two(choose, root, {**more, **deepspeed})
    assert first.startswith(f"PlanError: {said}")
    assert first.endswith("set deepspeed, FSDP and processes back, or use another output_dir")
    assert second == f"OtherProcessError: rank 0: {first.removeprefix('PlanError: ')}"


def test_the_same_zero_stage_goes_on(root):
    for rank in range(2):
        layout = {"deepspeed_stage": 3, "round_robin_gradients": False, "processes": 2}
        write_layout(save_checkpoint(root / f"node{rank}"), layout)
    assert said_by_two(choose, root, {"deepspeed": {"zero_optimization": {"stage": 3}}}) == [CHOSEN] * 2
