"""``--json``: one document on standard output and nothing else, whatever the command, its host or a process print."""

import json
import subprocess
import sys

import pytest

from llamafactory_adaptive import cli
from llamafactory_adaptive.cli import doctor
from llamafactory_adaptive.cli.json_output import kept_for_json
from llamafactory_adaptive.files import PLAN_FILE
from llamafactory_adaptive.ranks.plan import load_plan
from tests.helpers.runs import NASTY, save_run, save_whole_run
from tests.helpers.tiny import pruning_settings


def document(capsys, *words, code=0):
    assert cli.main([*map(str, words), "--json"]) == code
    said = capsys.readouterr().out
    assert said.isascii()
    return json.loads(said)


def test_what_others_print_meanwhile_goes_to_standard_error(capfd):
    for asked in (True, False):
        with kept_for_json(asked):
            print("by us")
            subprocess.run([sys.executable, "-c", "print('by another')"], check=True)
        print("{}")
        out, err = capfd.readouterr()
        assert out.split() == (["{}"] if asked else ["by", "us", "by", "another", "{}"])
        assert err.split() == (["by", "us", "by", "another"] if asked else [])


def test_the_plan_of_a_static_run_is_the_plan_that_was_written(write, tmp_path, capsys):
    told = document(capsys, "plan", write(lora_rank=5), "--out", tmp_path / "ranks")
    path = tmp_path / "ranks" / PLAN_FILE
    assert told["plan"] == load_plan(path).to_json() == json.loads(path.read_text())
    assert (told["schema_version"], told["found"], told["written"][0]) == (1, "before training", str(path))
    assert (told["origin"], told["warnings"]) == ("scored", [])
    assert told["seconds"] > 0


def test_the_plan_of_a_search_is_its_start(write, capsys):
    told = document(capsys, "plan", write(pruning_settings))
    assert (told["found"], told["written"], told["steps"], told["steps_known"]) == ("during training", [], 12, True)
    assert {module["rank"] for module in told["plan"]["modules"]} == {8}
    assert "8" in told["schedule"]


def test_a_users_error_leaves_standard_output_empty(write, capsys):
    assert cli.main(["plan", str(write(lora_rank=0)), "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "lora_rank" in told.err


def test_the_report_has_all_of_every_run(tmp_path, capsys):
    runs = [save_run(tmp_path / "first"), save_whole_run(tmp_path / "second")]
    told = document(capsys, "report", *runs)
    first, second = told["runs"]
    assert (told["schema_version"], told["others"], told["page"]) == (1, {}, None)
    assert first["folder"] == str(runs[0])
    assert (first["train_loss"], first["losses"]) == (2.4, [[1, 3.0], [2, 2.0]])
    assert first["eval_losses"] == [[1, 2.5], [2, 1.5]]
    assert first["costs"]["work"] == {"all": 4.0}
    assert (first["data_quality"], first["certificates"], first["evaluations"]) == (None, [], [])
    assert second["budget"]["used_parameters"] == 288
    assert second["costs"]["work"] == {"planning": 1.0, "observing": 3.0}
    assert second["costs"]["seconds"] == 50.0, "planning comes before what the log times"
    assert second["costs"]["memory"]["whole_run"] == {"host": 3 * 2**30, "device": 2**30}
    assert second["warnings"] == [NASTY]
    assert [proof["passed"] for proof in second["certificates"]] == [True]
    assert second["evaluations"][0]["scores"][0]["value"] == 0.5
    assert second["data_quality"]["samples"] == 3
    assert told["methods"] == [
        {"method": "sensitivity", "runs": 1, "mean_loss": 1.5, "standard_error": None},
        {"method": "igu", "runs": 1, "mean_loss": 1.5, "standard_error": None},
    ]


def test_the_report_tells_where_its_page_is_and_overwrites_none(tmp_path, capsys):
    run, page = save_run(tmp_path / "out"), tmp_path / "new" / "x.html"
    assert document(capsys, "report", run, "--html", page)["page"] == str(page)
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert cli.main(["report", str(run), "--html", str(page)]) == 2
    assert "it exists already, nothing was overwritten" in capsys.readouterr().err
    assert page.read_text() == text


def test_a_loss_that_is_no_number_is_null(tmp_path, capsys):
    run = save_run(tmp_path / "out", history=[{"train_loss": float("nan"), "step": 2}])
    told = document(capsys, "report", run)
    assert (told["runs"][0]["train_loss"], told["methods"][0]["mean_loss"]) == (None, None)


def test_doctor_tells_versions_and_a_verdict(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_hook_is_active", lambda: True)
    told = document(capsys, "doctor")
    assert (told["ready"], told["hook_active"], told["host_installed"]) == (True, True, True)
    assert set(told["packages"]) == set(doctor.PACKAGES)
    assert set(told["seams"].values()) == {"fits"}
    monkeypatch.setattr(doctor, "_hook_is_active", lambda: False)
    assert "lacks the hook" in document(capsys, "doctor", code=2)["verdict"]
    monkeypatch.setattr(doctor, "host_is_installed", lambda: False)
    assert document(capsys, "doctor")["host_installed"] is False


@pytest.mark.parametrize("command", ["plan", "report", "doctor"])
def test_the_keys_are_described(command):
    from tests.helpers.processes import ROOT

    assert f"`{command} --json`" in (ROOT / "docs" / "reports.md").read_text()
