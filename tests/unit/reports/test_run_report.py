"""What a person reads of finished runs."""

import statistics

import pytest

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.reports.run_report import Run, comparison, data_of_unfinished_run, read_run, run_text
from tests.helpers.plans import found_plan, make_plan
from tests.helpers.runs import save_data, save_run


def test_the_report_of_one_run_has_its_losses(tmp_path):
    run = Run(tmp_path, found_plan(), 30, 1.5, 1.25, 60.0, 3.0, losses=(3.0, 0.5, 1.0), eval_losses=(1.2, 1.25))
    said = run_text(run)
    assert "first 3.0000, last 1.0000, lowest 0.5000, mean 1.5000" in said
    assert "evaluation loss       last 1.2500, lowest 1.2000" in said
    assert "60.0, what plain LoRA has not 3.0 (5.0% of it)" in said


def test_a_run_is_read_from_its_files(tmp_path):
    run = read_run(save_run(tmp_path / "out"))
    assert (run.steps, run.losses, run.eval_losses) == (2, (3.0, 2.0), (2.5, 1.5))
    assert (run.train_loss, run.eval_loss, run.train_seconds, run.overhead_seconds) == (2.4, 1.5, 40.0, 4.0)
    assert run.plan.ranks() == make_plan().ranks()
    assert "what plain LoRA has not 4.0 (10.0% of it)" in run_text(run)


def test_a_run_that_logged_nothing_has_no_line_of_losses_or_seconds(tmp_path):
    run = read_run(save_run(tmp_path / "out", history=[{"loss": 2.0}]))
    said = run_text(run)
    assert "first 2.0000, last 2.0000, lowest 2.0000, mean unknown" in said
    assert "evaluation loss" not in said
    assert "seconds " not in said
    assert "training loss" not in run_text(read_run(save_run(tmp_path / "other", history=[])))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(PlanError, match=f"there is no run in {tmp_path}: {PLAN_FILE} is missing"):
        read_run(tmp_path)


def test_the_training_data_of_the_same_run_is_told_too(tmp_path):
    folder = save_run(tmp_path / "out")
    save_data(folder, make_plan())
    assert "Training data\nsamples                3 " in run_text(read_run(folder))
    save_data(folder, make_plan(lora_rank=8))
    assert "Training data" not in run_text(read_run(folder)), "of another run"


def test_data_of_a_run_that_was_cut_off_is_told_alone(tmp_path):
    assert data_of_unfinished_run(tmp_path) is None
    save_data(tmp_path, make_plan())
    assert data_of_unfinished_run(tmp_path).startswith(f"{tmp_path} (not finished)\n\nTraining data\nsamples ")
    save_data(save_run(tmp_path / "out"), make_plan())
    assert data_of_unfinished_run(tmp_path / "out") is None


def test_a_comparison_gives_mean_and_standard_error_of_each_method(tmp_path):
    losses = [1.0, 1.4, 1.5]
    runs = [Run(tmp_path / f"igu{i}", found_plan(), 9, 9.9, loss, 60.4, 3.0) for i, loss in enumerate(losses)]
    runs.append(Run(tmp_path / "plain", make_plan((3, 5), method="uniform"), 9, 2.5, None, None, 0.0))
    runs.append(Run(tmp_path / "lost", make_plan(method="random"), 9, None, None, None, 0.0))
    lines = [line.split() for line in comparison(runs).splitlines()]
    parameters = str(found_plan().budget()["used_parameters"])
    assert ["igu1", "igu", parameters, "0-6", "9", "9.9000", "1.4000", "60", "3.0", "s"] in lines
    assert ["plain", "uniform", "240", "3-5", "9", "2.5000", "0.0", "s"] in lines
    error = statistics.stdev(losses) / 3**0.5
    assert ["igu", "3", "1.3000", f"{error:.4f}"] in lines
    assert ["uniform", "1", "2.5000", "one", "run:", "unknown"] in lines
    assert not [line for line in lines if line[:2] == ["random", "0"]], "a run without a loss has no mean"
