"""The state of a search in a checkpoint: it comes back as it was, or one message says why not."""

import json

import pytest
import torch

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import STATE_JSON
from llamafactory_adaptive.training.checkpoint import read_state, tensor_file, write_state


TENSORS = {"mean.P/8x4": torch.arange(8.0).view(2, 4).T, "mean.Q/4x8": torch.tensor([0.1, float("nan")])}
DOCUMENT = {"step": 7, "history": [{"step": 2, "ranks": [3, 1]}]}


@pytest.fixture
def written(tmp_path):
    write_state(tmp_path / "checkpoint-7", TENSORS, DOCUMENT, partitioned=False, main=True)
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


def test_other_processes_that_hold_the_whole_adapter_write_nothing(tmp_path):
    write_state(tmp_path, TENSORS, DOCUMENT, partitioned=False, main=False)
    assert list(tmp_path.iterdir()) == []


def test_every_process_that_owns_pieces_writes_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.dist.get_rank", lambda rank=rank: rank)
        write_state(tmp_path, {"x": torch.tensor([float(rank)])}, DOCUMENT, partitioned=True, main=rank == 0)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    for rank in range(3):
        monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.dist.get_rank", lambda rank=rank: rank)
        assert read_state(tmp_path, partitioned=True)[0]["x"].tolist() == [rank]
    monkeypatch.setattr("llamafactory_adaptive.training.checkpoint.world_size", lambda: 2)
    with pytest.raises(PlanError, match="written by 3 processes that each held pieces of the adapter; resume with"):
        read_state(tmp_path, partitioned=True)


def test_a_whole_state_is_not_read_in_pieces(written):
    with pytest.raises(PlanError, match="written by 1 processes that each held the full adapter"):
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
        write_state(written, {"x": torch.ones(1)}, {"step": 8}, partitioned=False, main=True)
    tensors, document = read_state(written, partitioned=False)
    assert (set(tensors), document["step"]) == (set(TENSORS), 7)
    assert tensor_file(written, partitioned=False).is_file()
