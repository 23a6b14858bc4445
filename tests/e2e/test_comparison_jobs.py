"""The jobs of a comparison on tiny models: rows are split, a run is trained and judged."""

import errno
import json

import pytest
import torch
from datasets import load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llamafactory_adaptive.bridge import comparison_jobs
from llamafactory_adaptive.bridge.comparison_jobs import RunJob, decode_job, encode_job, losses_by_row
from llamafactory_adaptive.bridge.comparison_rows import HELD_OUT, TRAIN, SplitJob
from llamafactory_adaptive.errors import CalibrationError, OtherProcessError, OutputError
from tests.e2e.conftest import COUNT


pytestmark = pytest.mark.slow


def tokens(rows):
    return {tuple(row["input_ids"]) for row in rows}


def split(settings, rows, folder):
    """Split rows into ``folder/rows``; the counts, and tokens of each part."""
    counts = SplitJob(settings, rows, str(folder / "rows")).run()
    halves = json.loads((folder / "rows" / HELD_OUT).read_text())
    train = load_from_disk(str(folder / "rows" / TRAIN))
    assert [counts["train"], counts["dev"], counts["test"]] == [len(train), len(halves["dev"]), len(halves["test"])]
    return counts, halves, tokens(train)


# With predict_with_generate the host gives evaluation rows without their answers.
@pytest.mark.parametrize("more", [{}, {"eval_dataset": "rows", "predict_with_generate": True}])
def test_rows_are_split_into_those_that_train_choose_and_judge(more, yaml_settings, tmp_path):
    counts, halves, train = split({**yaml_settings, **more}, 40, tmp_path)
    assert [counts[part] for part in ("train", "dev", "test")] == [COUNT - 40, 20, 20]
    assert len(train | tokens(halves["dev"]) | tokens(halves["test"])) == COUNT, "no row is in two parts"
    for row in halves["dev"]:
        assert len(row["labels"]) == len(row["input_ids"])
        assert 0 < sum(label != -100 for label in row["labels"]) < len(row["labels"]), "answers alone take loss"


def test_no_row_is_held_out_twice_and_at_most_a_fifth_of_those_to_train_on(yaml_settings, tmp_path):
    with pytest.raises(CalibrationError, match=r"12 different rows with an answer can be held out, .* needs 40"):
        SplitJob({**yaml_settings, "eval_dataset": "few"}, 40, str(tmp_path / "rows")).run()
    assert not (tmp_path / "rows").exists()
    _, halves, train = split({**yaml_settings, "dataset": "twice"}, 40, tmp_path)
    assert not tokens(halves["dev"]) & tokens(halves["test"])
    assert len(train) == 10
    counts, _, _ = split({**yaml_settings, "dataset": "many"}, 400, tmp_path)
    assert [counts[part] for part in ("train", "dev", "test")] == [240, 30, 30]
    assert [path.name for path in tmp_path.iterdir()] == ["rows"], "and nothing else is left"


def job(settings, folder, **more):
    """A run on rows that :func:`split` has made."""
    folders = {"output_dir": str(folder / "out"), "tokenized_path": str(folder / "rows" / TRAIN)}
    return RunJob({**settings, **folders, **more}, str(folder / "rows" / HELD_OUT))


def test_a_run_is_judged_row_by_row_with_the_adapter_that_it_saved(yaml_settings, tiny_llama, tmp_path):
    _, halves, _ = split(yaml_settings, 40, tmp_path)
    outcome = decode_job(encode_job(job(yaml_settings, tmp_path, learning_rate=0.1))).run()
    assert (outcome["status"], outcome["steps"]) == ("done", 4)
    assert not list(tmp_path.rglob("training_args.bin")), "a pickle of all arguments"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "out").eval()
    assert outcome["parameters"] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    for half, rows in halves.items():
        for row, loss in zip(rows, outcome[half], strict=True):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                assert loss == pytest.approx(float(model(input_ids=ids, labels=labels).loss), rel=1e-4)


def test_a_run_that_diverges_is_said_to_and_ends_early(yaml_settings, tmp_path):
    split(yaml_settings, 40, tmp_path)
    hot = {"learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 50, "logging_steps": 500}
    outcome = job(yaml_settings, tmp_path, **hot).run()
    assert outcome["status"] == "diverged"
    assert "not finite for 3 steps in a row (up to step 4)" in outcome["why"]


def test_judging_takes_smaller_batches_where_memory_runs_out(monkeypatch):
    sizes = []

    def measured(model, rows, batch_size, pad_id):
        sizes.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [0.5]

    monkeypatch.setattr(comparison_jobs, "_losses_by_row", measured)
    assert losses_by_row(None, [], 8, 0) == [0.5]
    assert sizes == [8, 4, 2]


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "cannot be written"),
        (RuntimeError("CUDA error: device-side assert triggered\nmore"), OtherProcessError, "the device is lost"),
        (torch.OutOfMemoryError("CUDA out of memory"), CalibrationError, "lower per_device_train_batch_size"),
        (KeyError("a bug"), KeyError, "a bug"),
    ],
)
def test_failures_that_tell_of_the_machine_are_told_apart(error, kind, said, tmp_path):
    with pytest.raises(kind, match=said), comparison_jobs._in_words(tmp_path):
        raise error
