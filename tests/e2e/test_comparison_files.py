"""What a comparison knows its rows and runs by: what the files hold that its settings name."""

import json
import os
import shutil

import pytest

from llamafactory_adaptive.bridge import comparison
from llamafactory_adaptive.bridge.comparison_rows import HELD_OUT
from llamafactory_adaptive.comparison.arms import choose_arms
from llamafactory_adaptive.comparison.experiment import Design, Run
from llamafactory_adaptive.errors import AdaptiveConfigError


pytestmark = pytest.mark.slow


def compared(yaml_settings, folder, say=lambda said: None):
    arms = choose_arms([], [], yaml_settings)
    made = comparison.Comparison(yaml_settings, arms, Design((0.01,), seeds=1), folder, 40)
    made.prepare(say)
    return made, json.dumps(made.key(made.design.final("lora", made.design.grid[0])[0]), sort_keys=True)


def test_other_rows_are_another_split_and_another_run_and_the_first_ones_are_kept(
    yaml_settings, comparison_data, in_this_process, tmp_path
):
    mine = tmp_path / "data"
    shutil.copytree(comparison_data, mine)
    given = {**yaml_settings, "dataset_dir": str(mine)}
    first, key = compared(given, tmp_path)
    kept = (first.rows / HELD_OUT).read_bytes()
    second, other = compared({**given, "dataset": "twice"}, tmp_path)
    assert (other != key, second.rows != first.rows) == (True, True)
    again, same = compared(given, tmp_path)
    assert (same, again.rows, len(in_this_process)) == (key, first.rows, 2)
    assert (first.rows / HELD_OUT).read_bytes() == kept
    rows = json.loads((mine / "rows.json").read_text())
    (mine / "rows.json").write_text(json.dumps([{**row, "output": "moon"} for row in rows]))
    _, edited = compared(given, tmp_path)
    assert edited != key, "the file was edited in place"
    assert len(in_this_process) == 3


def test_a_model_that_is_changed_in_place_is_another_run(yaml_settings, in_this_process, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(yaml_settings["model_name_or_path"], model)
    given = {**yaml_settings, "model_name_or_path": str(model)}
    _, key = compared(given, tmp_path)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert compared(given, tmp_path)[1] != key


def test_the_model_is_read_once_for_its_digest(yaml_settings, in_this_process, tmp_path):
    said = []
    for _ in range(2):
        compared(yaml_settings, tmp_path, said.append)
    assert sum("reading the model's files" in line for line in said) == 1


def test_a_model_that_is_copied_anew_is_the_same_and_a_large_file_with_other_bytes_another(
    yaml_settings, in_this_process, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(yaml_settings["model_name_or_path"], model)
    given, large, keys = {**yaml_settings, "model_name_or_path": str(model)}, model / "more.bin", []
    for at in (0, 0, 2**26):
        with large.open("wb") as file:
            file.truncate(2**26 + 1)
            file.seek(at)
            file.write(b"1")
        os.utime(large, ns=(len(keys), len(keys)))
        (model / ".downloads").write_text(str(len(keys)))
        keys.append(compared(given, tmp_path)[1])
    assert keys[0] == keys[1] != keys[2]


def test_an_edited_plan_and_other_calibration_rows_are_other_runs(
    yaml_settings, comparison_data, in_this_process, tmp_path
):
    mine, plan = tmp_path / "data", tmp_path / "plan.json"
    shutil.copytree(comparison_data, mine)
    table = json.loads((mine / "dataset_info.json").read_text())
    (mine / "more.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    (mine / "dataset_info.json").write_text(json.dumps({**table, "more": {"file_name": "more.json"}}))
    given = {**yaml_settings, "dataset_dir": str(mine), "finetuning_type": "lora"}
    own = [f"planned:{{adaptive_method: sensitivity, adaptive_plan: {plan}}}",
           "scored:adaptive_method=sensitivity,adaptive_calibration_dataset=more"]  # fmt: skip

    def prepared():
        made = comparison.Comparison(given, choose_arms([], own, given), Design((0.01,), seeds=1), tmp_path, 40)
        made.prepare(lambda said: None)
        return made, [
            json.dumps(made.key(Run(name, made.design.grid[0], 0, None)), sort_keys=True) for name in made.arms
        ]

    plan.write_text("{}")
    first, keys = prepared()
    assert prepared()[1] == keys
    plan.write_text('{"edited": true}')
    (mine / "more.json").write_text(json.dumps([{"instruction": "a", "output": "c"}]))
    edited = prepared()[1]
    assert [a == b for a, b in zip(keys, edited, strict=True)] == [True, True, False, False]
    with pytest.raises(
        AdaptiveConfigError, match=r"^adaptive_plan: .* changed while the comparison ran \(arm planned"
    ):
        first.train(Run("planned", first.design.grid[0], 0, None), None)
