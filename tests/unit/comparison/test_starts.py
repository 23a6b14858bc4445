"""What was fixed at the first start, and is told where it was changed."""

import json

from llamafactory_adaptive.comparison.starts import STARTS_FILE, changes, note_start


FIXED = {"effect": 0.005, "seeds": 5, "arms": ["lora", "igu"]}


def test_what_stays_is_not_told_and_what_is_changed_is_for_good(tmp_path):
    assert changes(note_start(tmp_path, FIXED)) == []
    assert changes(note_start(tmp_path, FIXED)) == []
    changed = note_start(tmp_path, {**FIXED, "effect": 0.02, "arms": ["lora", "igu", "dora"]})
    assert changes(changed) == [
        "--effect was changed after the comparison had begun: 0.5 %, then 2 %",
        "--arms was changed after the comparison had begun: lora,igu, then lora,igu,dora",
    ]
    again = changes(note_start(tmp_path, FIXED))
    assert again[0] == "--effect was changed after the comparison had begun: 0.5 %, then 2 %, then 0.5 %"
    assert len(again) == 2


def test_how_tasks_are_asked_is_no_change_where_none_was_asked_before(tmp_path):
    none = {**FIXED, "tasks": None, "task-effect": None, "eval-limit": None}
    asked = {**FIXED, "tasks": "boolq", "task-effect": 0.01, "eval-limit": 400}
    note_start(tmp_path, none)
    first = "--tasks was changed after the comparison had begun: none, then boolq"
    assert changes(note_start(tmp_path, asked)) == [first]
    assert changes(note_start(tmp_path, {**asked, "eval-limit": 200})) == [
        first, "--eval-limit was changed after the comparison had begun: 400, then 200",
    ]  # fmt: skip


def test_starts_of_earlier_versions_have_effects_as_text_and_fewer_keys(tmp_path):
    (tmp_path / STARTS_FILE).write_text(json.dumps([{"effect": "0.5%", "task-effect": "1", "seeds": 5}]))
    now = {"effect": 0.005, "task-effect": 0.01, "seeds": 5, "steps": 300, "alphas": None}
    assert changes(note_start(tmp_path, now)) == []
    assert changes(note_start(tmp_path, {**now, "task-effect": 0.02, "alphas": [8.0, 16.0]})) == [
        "--task-effect was changed after the comparison had begun: 1 point, then 2 points",
        "--alphas was changed after the comparison had begun: none, then 8,16",
    ]
