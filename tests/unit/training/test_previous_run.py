"""What an older run left behind is moved aside, not over."""

from pathlib import Path

from llamafactory_adaptive.training import previous_run


def test_an_older_run_is_moved_aside_but_for_what_the_settings_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    (out / "checkpoint-4").mkdir()
    for name in ("adaptive_rank_plan.json", "adaptive_samples.jsonl", "trainer_state.json", "notes.txt",
                 "adapter_model.safetensors", "checkpoint-2/adaptive_rank_plan.json", "checkpoint-4/x"):  # fmt: skip
        (out / name).write_text(name)
    (out / "checkpoint-2" / "adaptive_rank_plan.json").unlink()
    assert previous_run.set_previous_run_aside(out) is None, "a plan alone is no run"
    (out / "adaptive_log.jsonl").write_text("")
    aside = previous_run.set_previous_run_aside(out, [out / "checkpoint-4" / "x"])
    assert aside == out / "_adaptive_previous" / "1"
    assert {path.name for path in aside.iterdir()} == {
        "adaptive_log.jsonl", "adaptive_rank_plan.json", "adaptive_samples.jsonl", "trainer_state.json",
        "checkpoint-2",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == {
        "_adaptive_previous", "checkpoint-4", "notes.txt", "adapter_model.safetensors",
    }  # fmt: skip
    (out / "adaptive_log.jsonl").write_text("")
    assert previous_run.set_previous_run_aside(out) == out / "_adaptive_previous" / "2"
