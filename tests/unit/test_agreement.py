"""Two processes of one job: they agree or stop together, before any process group exists and any model is loaded.

Where they stand for nodes that share no folder, each has a working directory of its own.
"""

import json
import os
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import rows, settings
from workers import said_by_two

from llamafactory_adaptive import files
from llamafactory_adaptive.errors import AdaptiveError, GuardError, OtherProcessError, PlanError
from llamafactory_adaptive.training.checkpoint_files import write_layout


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


# -- what they tell each other ----------------------------------------------------------------------------------------


def meet(rank: int, case: str) -> Any:
    from llamafactory_adaptive.engines import distributed
    from llamafactory_adaptive.planning.cache import wait_for_plan

    def refuse() -> None:
        raise PlanError("no plan here")

    if case == "agree":
        distributed.wait_for_all("a place")
        return distributed.gather("a place", lambda: rank)
    if case == "refused by rank 0":
        return distributed.from_main("a place", refuse)
    if case == "refused by rank 1":
        return distributed.gather("a place", refuse if rank == 1 else lambda: None)
    if case == "one waits for the other's plan":
        never = Path("/nowhere/plan.json")
        work = refuse if rank == 0 else lambda: wait_for_plan(never, 600.0, lambda: distributed.failure_of(0))
        return distributed.gather("the start", work)
    if case == "different":
        everyone = distributed.gather("a place", lambda: rank)
        return distributed.refuse_differences(everyone, "have another number")
    distributed.wait_for_all("a place")
    if rank == 1:
        time.sleep(4)
    return distributed.gather("the last place", lambda: rank, seconds=1.0) if rank == 0 else "late"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("agree", ["[0, 1]", "[0, 1]"]),
        ("refused by rank 0", ["PlanError: no plan here", "OtherProcessError: rank 0: no plan here"]),
        ("refused by rank 1", ["OtherProcessError: rank 1: no plan here", "PlanError: no plan here"]),
        ("one waits for the other's plan", ["PlanError: no plan here", "OtherProcessError: rank 0: no plan here"]),
        ("different", ["GuardError: ranks [1] have another number"] * 2),
        ("late", ["GuardError: rank 1 did not come to the last place within 1 s, or it has ended: see its own "
                  "messages", "late"]),
    ],
)  # fmt: skip
def test_processes_agree_or_stop_together_and_none_hangs(case: str, expected: list[str]) -> None:
    assert issubclass(OtherProcessError, AdaptiveError)
    assert issubclass(GuardError, AdaptiveError)
    assert said_by_two(meet, case) == expected


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
    found = said_by_two(choose, root, {**more, **deepspeed})
    assert found == [f"PlanError: {said}", f"OtherProcessError: rank 0: {said}"]


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
        from llamafactory_adaptive.bridge.host_run import LlamaFactoryRun
        from llamafactory_adaptive.bridge.validation import parse_config
        from llamafactory_adaptive.planning.sources import fresh_plan

        for rank, seed in enumerate(seeds):
            args = settings(tiny_llama, data_dir, root / "unused", adaptive_method="random")
            drawn = {key: value for key, value in args.items() if not key.startswith("adaptive_calibration")}
            drawn["adaptive_calibration_seed"] = seed
            fresh_plan(parse_config(drawn), LlamaFactoryRun(drawn)).plan.save(root / f"node{rank}" / "plan.json")
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


# -- steps and samples ------------------------------------------------------------------------------------------------


def begin_steps(rank: int, states: list[dict[str, int]]) -> str:
    from llamafactory_adaptive.training.bound_run import BoundRun, RunRequest
    from llamafactory_adaptive.training.guard import PlanGuard
    from llamafactory_adaptive.training.run_log import RunLog

    guard: Any = PlanGuard(None, RunLog("igu", 0.0))  # type: ignore[arg-type]
    guard.verify_live = lambda args, model: None  # of plan and model, which is not what this is about
    arguments: Any = SimpleNamespace(should_save=False, output_dir="out")
    run = BoundRun(RunRequest(3), guard, SimpleNamespace(args=arguments), lambda: None)
    run.begin(arguments, SimpleNamespace(**states[rank]), None, None, None)  # type: ignore[arg-type]
    return "it trains"


SAME = {"global_step": 0, "max_steps": 12}


@pytest.mark.parametrize("other", [SAME | {"max_steps": 9}, SAME | {"global_step": 4}], ids=["fewer", "resumed"])
def test_other_steps_on_one_process_stop_both_before_the_first(other):
    said = f"GuardError: ranks [1] would train other steps than rank 0: {[SAME, other]}"
    assert said_by_two(begin_steps, [SAME, other]) == [said] * 2


def test_the_same_steps_on_both_are_trained():
    assert said_by_two(begin_steps, [SAME, SAME]) == ["it trains"] * 2


def begin_sampling(rank: int, samples: list[list[dict[str, list[int]]]], folder: Path) -> str:
    """Up to where scores are taken from a checkpoint, which has none."""
    from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
    from llamafactory_adaptive.training.sample_preparation import SampleRequest, TrainingSamples

    arguments = SimpleNamespace(
        remove_unused_columns=False, train_batch_size=2, world_size=2, gradient_accumulation_steps=1
    )
    request = SampleRequest(Tsq(TsqOptions()).sampling, 0, {}, folder)
    prepared = TrainingSamples(request, SimpleNamespace(args=arguments, train_dataset=samples[rank]))
    batches = range(len(prepared.sampler) // (arguments.train_batch_size * arguments.world_size))
    try:
        prepared.prepare_samples(None, 12, batches, folder)  # type: ignore[arg-type]
    except PlanError as error:
        return str(error)
    return "the checkpoint had scores"


def test_other_training_samples_on_one_process_stop_both_before_any_is_scored(tmp_path):
    begin = partial(said_by_two, begin_sampling)
    same, short = rows(24), rows(20)
    assert all(said.startswith(f"{tmp_path} holds no qualities of these training samples") for said in
               begin([same, same], tmp_path))  # fmt: skip
    words = "GuardError: ranks [1] have other training samples than rank 0 (numbers by rank: {})"
    assert begin([same, short], tmp_path) == [words.format([24, 20])] * 2
    relabelled = [*same[:-1], {**same[-1], "labels": same[-1]["input_ids"]}]
    for other in (rows(24, seed=1), list(reversed(same)), relabelled):
        assert begin([same, other], tmp_path) == [words.format([24, 24])] * 2
