"""What was fixed at the first start, and is told where it was changed."""

from llamafactory_adaptive.comparison.starts import changes, note_start


FIXED = {"effect": "0.5%", "seeds": 5, "arms": ["lora", "igu"]}


def test_what_stays_is_not_told_and_what_is_changed_is_for_good(tmp_path):
    assert changes(note_start(tmp_path, FIXED)) == []
    assert changes(note_start(tmp_path, FIXED)) == []
    changed = note_start(tmp_path, {**FIXED, "effect": "2%", "arms": ["lora", "igu", "dora"]})
    assert changes(changed) == [
        "--effect was changed after the comparison had begun: 0.5%, then 2%",
        "--arms was changed after the comparison had begun: lora,igu, then lora,igu,dora",
    ]
    again = changes(note_start(tmp_path, FIXED))
    assert again[0] == "--effect was changed after the comparison had begun: 0.5%, then 2%, then 0.5%"
    assert len(again) == 2
