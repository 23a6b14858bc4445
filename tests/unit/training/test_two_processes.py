"""Two processes of one run stop together where they would train other steps or samples."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamafactory_adaptive import files
from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.sampling.quality import SampleTerms
from llamafactory_adaptive.training.sample_scores import write_terms
from tests.helpers.tiny import rows
from tests.helpers.workers import said_by_two


def begin_steps(rank: int, states: list[dict[str, int]]) -> str:
    from torch import nn

    from llamafactory_adaptive.training.bound_run import BoundRun, RunRequest
    from llamafactory_adaptive.training.guard import PlanGuard
    from llamafactory_adaptive.training.run_log import RunLog

    guard: Any = PlanGuard(None, RunLog("igu", 0.0))  # type: ignore[arg-type]
    arguments: Any = SimpleNamespace(should_save=False, output_dir="out", deepspeed=None)
    run = BoundRun(RunRequest(3), guard, SimpleNamespace(args=arguments, model=nn.Module()), lambda: None)
    run.build_parts(SimpleNamespace(**states[rank]), None, None)
    return "it trains"


SAME = {"global_step": 0, "max_steps": 12}


@pytest.mark.parametrize("other", [SAME | {"max_steps": 9}, SAME | {"global_step": 4}], ids=["fewer", "resumed"])
def test_other_steps_on_one_process_stop_both_before_the_first(other):
    facts = [{**state, "epoch_steps": None} for state in (SAME, other)]
    said = f"GuardError: ranks [1] would train other steps than rank 0: {facts}"
    assert said_by_two(begin_steps, [SAME, other]) == [said] * 2


def test_the_same_steps_on_both_are_trained():
    assert said_by_two(begin_steps, [SAME, SAME]) == ["it trains"] * 2


def begin_sampling(rank: int, samples: list[list[dict[str, list[int]]]], folder: Path) -> str:
    """Up to where scores are taken from a checkpoint, which has none."""
    from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
    from llamafactory_adaptive.training.run_log import RunLog
    from llamafactory_adaptive.training.sample_preparation import TrainingSamples
    from llamafactory_adaptive.training.sample_scoring import SampleRequest

    arguments = SimpleNamespace(
        remove_unused_columns=False,
        train_batch_size=2,
        world_size=2,
        gradient_accumulation_steps=1,
        dataloader_num_workers=0,
        dataloader_prefetch_factor=None,
    )
    request = SampleRequest(Tsq(TsqOptions()).sampling, 0, {}, folder)
    prepared = TrainingSamples(request, SimpleNamespace(args=arguments, train_dataset=samples[rank]))
    batches = range(len(prepared.sampler) // (arguments.train_batch_size * arguments.world_size))
    try:
        prepared.prepare_samples(None, 12, batches, folder, RunLog("tsq", 0.0))  # type: ignore[arg-type]
    except PlanError as error:
        return str(error)
    return "the checkpoint had scores"


def test_other_training_samples_on_one_process_stop_both_before_any_is_scored(tmp_path):
    begin = partial(said_by_two, begin_sampling)
    same, short = rows(24), rows(20)
    first, second = begin([same, same], tmp_path)
    assert first.startswith(f"{tmp_path} holds no qualities of these training samples")
    assert second == f"OtherProcessError: rank 0: {first}"
    words = "GuardError: ranks [1] have other training samples than rank 0 (numbers by rank: {})"
    assert begin([same, short], tmp_path) == [words.format([24, 20])] * 2
    relabelled = [*same[:-1], {**same[-1], "labels": same[-1]["input_ids"]}]
    for other in (rows(24, seed=1), list(reversed(same)), relabelled):
        assert begin([same, other], tmp_path) == [words.format([24, 24])] * 2


def take_scores(rank: int, root: Path, resumed: bool) -> str:
    """Scores of the samples from the files of this process's node."""
    from torch import distributed as dist

    from llamafactory_adaptive.methods.tsq import Tsq, TsqOptions
    from llamafactory_adaptive.training.sample_scoring import SampleRequest, SampleScorer

    dist.init_process_group("gloo", rank=rank, world_size=2)
    node = root / f"node{rank}"
    request = SampleRequest(Tsq(TsqOptions()).sampling, 0, {}, node)
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cpu")))
    scorer: Any = SampleScorer(request, trainer, range(4), [3] * 4, "rows")
    scorer._term_spec, scorer._cache_key = lambda: None, lambda spec: "scores"
    scored = scorer.restored(node) if resumed else [scorer.first()]
    dist.destroy_process_group()
    return str([terms.loss.tolist() for terms in scored])


@pytest.mark.parametrize("resumed", [False, True], ids=["cached", "resumed"])
@pytest.mark.parametrize("other", [None, 9.0], ids=["none", "others"])
def test_the_scores_of_samples_are_those_of_rank_0s_node(resumed, other, tmp_path):
    name = files.QUALITY_FILE if resumed else "scores.safetensors"
    scorings = 2 if resumed else 1
    for rank, first in enumerate((1.0, other)):
        (path := tmp_path / f"node{rank}" / name).parent.mkdir()
        if first is not None:
            values = torch.arange(20.0, dtype=torch.float64).view(5, 4) + first
            write_terms(path, [SampleTerms(*values.clone()) for _ in range(scorings)], "rows")
            files.note_checksum(path)
    assert said_by_two(take_scores, tmp_path, resumed) == [str([[1.0, 2.0, 3.0, 4.0]] * scorings)] * 2
