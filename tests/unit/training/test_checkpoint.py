"""The state of a search in a checkpoint: it comes back as it was, or one message says why not."""

import json

import pytest
import torch
from safetensors.torch import save_file

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import STATE_JSON
from llamafactory_adaptive.training.checkpoint import read_state, write_state


TENSORS = {"mean.P/8x4": torch.arange(8.0).view(2, 4).T, "mean.Q/4x8": torch.tensor([0.1, float("nan")])}
DOCUMENT = {"step": 7, "history": [{"step": 2, "ranks": [3, 1]}]}


@pytest.fixture
def written(tmp_path):
    write_state(tmp_path / "checkpoint-7", TENSORS, DOCUMENT)
    return tmp_path / "checkpoint-7"


def change(folder, **facts):
    path = folder / STATE_JSON
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def test_tensors_and_document_come_back_as_they_were(written):
    tensors, document = read_state(written, partitioned=False)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name].nan_to_num(9.0), TENSORS[name].nan_to_num(9.0)) for name in TENSORS)
    assert {key: document[key] for key in DOCUMENT} == DOCUMENT
    assert document["processes"] == 1


@pytest.mark.parametrize("partitioned", [False, True], ids=["whole", "pieces"])
def test_every_engine_reads_the_whole_state(partitioned, written):
    tensors, document = read_state(written, partitioned)
    assert tensors.keys() == TENSORS.keys()
    assert not document["partitioned"]


def test_pieces_that_an_earlier_version_wrote_are_read_by_as_many_processes(written, monkeypatch):
    change(written, partitioned=True, processes=3)
    for rank in range(3):
        save_file({"x": torch.tensor([float(rank)])}, written / f"adaptive_state-0000{rank + 1}-of-00003.safetensors")
    monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.process_number", lambda rank=rank: rank)
        assert read_state(written, partitioned=True)[0]["x"].tolist() == [rank]
    said = (
        "written by an earlier version, by 3 processes that each held pieces of the adapter; resume with the same Deep"
    )
    with pytest.raises(PlanError, match=said):
        read_state(written, partitioned=False)
    monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.world_size", lambda: 2)
    with pytest.raises(PlanError, match=said):
        read_state(written, partitioned=True)


def test_another_schema_is_named(written):
    change(written, schema_version=1)
    with pytest.raises(PlanError, match="has state schema 1; this version reads 2"):
        read_state(written, partitioned=False)


@pytest.mark.parametrize("name", [STATE_JSON, "adaptive_state.safetensors"])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_text("{")], ids=["gone", "cut"])
def test_files_that_are_gone_or_cut_short_lead_to_an_earlier_checkpoint(name, spoil, written):
    spoil(written / name)
    with pytest.raises(PlanError, match=r"no complete adaptive state .*; resume from an earlier checkpoint"):
        read_state(written, partitioned=False)


def test_a_state_without_its_facts_is_incomplete(written):
    (written / STATE_JSON).write_text("{}")
    with pytest.raises(PlanError, match=r"no complete adaptive state \(KeyError: 'schema_version'\)"):
        read_state(written, partitioned=False)


def test_a_failed_write_leaves_the_older_state(written, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.save_file", full)
    with pytest.raises(Exception, match="No space left"):
        write_state(written, {"x": torch.ones(1)}, {"step": 8})
    tensors, document = read_state(written, partitioned=False)
    assert (set(tensors), document["step"]) == (set(TENSORS), 7)
