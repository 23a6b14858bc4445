"""A run that memory runs out on begins anew with smaller batches: it is then the run that began with these."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from llamafactory_adaptive import rank_search
from llamafactory_adaptive.errors import GuardError
from llamafactory_adaptive.files import LOG_FILE
from tests.helpers.searches import trainer_of
from tests.helpers.tiny import tiny_model


LARGEST = 3


class SmallDevice(Trainer):
    """A Trainer whose device holds batches of three rows; of four only for the first ``holds`` of them."""

    holds = 0

    def training_step(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) > LARGEST:
            self.holds -= 1
            if self.holds < 0:
                raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")
        return super().training_step(model, inputs, *args, **kwargs)


METHODS = {
    "igu": {"interval": 2},
    # breaks off at a position within the path
    "igu, shrink": {"interval": 2, "importance": "shrink", "mend_strength": True},
    "elalora": {"interval": 2},
    "tsq": {"sampling": False},  # has hooks on the factors
}


def search_of(method):
    return rank_search(tiny_model(), method.partition(",")[0], lora_rank=2, **METHODS[method])


def run(folder, holds, method="igu", **more):
    """What a run finds: ranks, the adapter, and the log's lines; and how many hooks its model ends with."""
    torch.manual_seed(0)
    search = search_of(method)
    trainer_class = type("Device", (SmallDevice,), {"holds": holds})
    trainer = trainer_of(search, folder, trainer_class=trainer_class, max_steps=8,
                         train_sampling_strategy="sequential", **more)  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))
    plan = search.finalize(folder)
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in search.model.modules())
    return plan.ranks(), load_file(folder / "adapter_model.safetensors"), lines, hooks


@pytest.mark.parametrize(
    ("method", "holds"),
    [
        pytest.param("igu", 0, marks=pytest.mark.repeats),
        ("igu", 5),
        ("igu, shrink", 5),
        pytest.param("elalora", 5, marks=pytest.mark.repeats),
        ("tsq", 5),
    ],
)
def test_a_search_begins_anew_as_if_its_batches_had_been_small_from_the_start(tmp_path, method, holds):
    ranks, adapter, lines, hooks = run(tmp_path / "found", holds, method,
                                per_device_train_batch_size=4, auto_find_batch_size=True)  # fmt: skip
    expected_ranks, expected, expected_lines, expected_hooks = run(
        tmp_path / "given", 0, method, per_device_train_batch_size=LARGEST
    )
    assert ranks == expected_ranks
    assert len(set(ranks.values())) > 1
    assert all(torch.equal(adapter[name], expected[name]) for name in expected)
    told = [[line["event"] for line in each] for each in (lines, expected_lines)]
    assert told[0] == told[1]
    assert lines[-1]["counters"] == expected_lines[-1]["counters"]
    assert hooks == expected_hooks


def test_what_cannot_be_set_back_ends_the_run_with_a_batch_size_to_set(tmp_path):
    search = search_of("igu")
    embeddings = search.model.get_input_embeddings().weight
    trainer = trainer_of(search, tmp_path, trainer_class=SmallDevice, per_device_train_batch_size=4,
                         auto_find_batch_size=True)  # fmt: skip
    embeddings.requires_grad_(True)
    with pytest.raises(
        GuardError, match=r"embed_tokens\S* trains beside the adapter.* per_device_train_batch_size: 3"
    ):
        trainer.train()


def test_a_trainer_that_has_ended_does_not_begin_anew(tmp_path):
    search = search_of("igu")
    trainer = trainer_of(search, tmp_path, max_steps=8, auto_find_batch_size=True)
    trainer.train()
    masks = [list(row) for row in trainer.adaptive_callback.bound.search.triplets.masks]
    trainer.adaptive_callback.begin_attempt(None)
    assert trainer.adaptive_callback.bound.search.triplets.masks == masks
