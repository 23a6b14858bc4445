"""``report`` on folders whose files hold something else: one message or what can still be told, never a traceback."""

import json
import os

import pytest

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.files import CUT_FILE, LOG_FILE, PLAN_FILE
from llamafactory_adaptive.ranks.plan import ModulePlan, RankPlan
from llamafactory_adaptive.reports.data_report import DATA_REPORT_FILE, _short, data_table
from llamafactory_adaptive.reports.run_report import read_run, run_text, text_of_cut_adapter


STATES = ("[]", "null", "[" * 100_000, '{"log_history": 5, "global_step": 1}',
          '{"log_history": [], "global_step": "many"}', '{"log_history": [], "global_step": null}',
          '{"log_history": [], "global_step": Infinity}')  # fmt: skip
LOGS = ("[1]", "5", "null", "[" * 100_000, '{"overhead_seconds": "x"}', '{"overhead_seconds": [1]}',
        '{"overhead_seconds": ' + "9" * 400 + "}")  # fmt: skip


@pytest.fixture
def run(tmp_path):
    modules = (ModulePlan("model.layers.0.q_proj", 8, 8, 2),)
    RankPlan("uniform", {}, "params", 2, 4.0, modules, {}).write(tmp_path / PLAN_FILE)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"loss": 1.5}], "global_step": 1}')
    (tmp_path / LOG_FILE).write_text('{"overhead_seconds": 1.0}\n')
    return tmp_path


@pytest.mark.parametrize("text", STATES, ids=lambda text: text[:50])
def test_a_state_of_another_shape(text, run):
    (run / "trainer_state.json").write_text(text)
    with pytest.raises(PlanError, match="has not ended"):
        read_run(run)


@pytest.mark.parametrize("text", LOGS, ids=lambda text: text[:50])
def test_a_log_of_another_shape(text, run):
    (run / LOG_FILE).write_text(text + "\n")
    with pytest.raises(PlanError, match="has not ended"):
        read_run(run)


def test_a_log_that_is_a_pipe_is_not_waited_for(run):
    (run / LOG_FILE).unlink()
    os.mkfifo(run / LOG_FILE)
    with pytest.raises(PlanError, match="no regular file"):
        read_run(run)


def test_entries_that_are_no_numbers_are_passed_over(run):
    history = [5, None, {"loss": 2.0}, {"loss": 10**400}, {"loss": "low"}, {"loss": True}, {"train_loss": [1]}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 1}))
    loaded = read_run(run)
    assert loaded.losses == (2.0,)
    assert loaded.train_loss is None
    assert "first 2.0000" in run_text(loaded)


@pytest.mark.parametrize("change", [{}, {"samples": "many"}, {"best": [5]}, {"distribution": [1]}], ids=str)
def test_a_data_report_of_another_shape(change):
    with pytest.raises(PlanError, match=DATA_REPORT_FILE):
        data_table({"schema_version": 1, **change})


def test_training_data_cannot_recolour_the_terminal():
    assert _short("\x1b[31mred \u202e", 100) == r"\x1b[31mred \u202e"


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"parameters_before": "many", "kept_energy": 1}'])
def test_a_cut_adapter_without_a_whole_certificate_is_one_message(text, run):
    (run / CUT_FILE).write_text(text)
    assert text_of_cut_adapter(run) is None  # a run that trained on, in the folder of a cut adapter
    (run / "trainer_state.json").unlink()
    with pytest.raises(PlanError, match=CUT_FILE):
        text_of_cut_adapter(run)
    (run / CUT_FILE).write_text('{"parameters_before": 64, "kept_energy": 0.5}')
    assert "from 64 parameters; 50.00% of the squared singular values kept" in str(text_of_cut_adapter(run))
