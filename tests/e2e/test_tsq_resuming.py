"""Interrupted TsqLoRA runs resume as if they had not been, and on nothing but their own rows, options and ranks."""

import pytest

from llamafactory_adaptive.errors import PlanError
from llamafactory_adaptive.ranks.plan import load_plan
from llamafactory_adaptive.reports.data_report import SAMPLES_FILE, read_data_report
from tests.helpers.tiny import tsq_settings
from tests.helpers.training import adapters_equal, batches_seen, train


pytestmark = pytest.mark.slow
SAVING = {"save_strategy": "steps", "save_steps": 4, "overwrite_output_dir": False, "lora_dropout": 0.1}
PARTS = {
    "both": {"tsq_alignment_weight": 1.0, "tsq_refresh_quality": True, "tsq_min_cluster_share": 0.5},
    "samples": {"tsq_reallocation": False},
    "ranks": {"tsq_sampling": False},
}


@pytest.mark.parametrize("part", list(PARTS))
def test_interrupted_and_resumed_equals_uninterrupted(part, tiny_llama, data_dir, tmp_path, monkeypatch):
    """Crash after step 5, resume from step 4: in the middle of an epoch and between two refreshes."""
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path / "first"))  # one run scores, the other re-uses
    more = {**SAVING, **PARTS[part]}
    seen = batches_seen(monkeypatch)
    train(tsq_settings(tiny_llama, data_dir, uninterrupted, **more))
    expected = list(seen)
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train(tsq_settings(tiny_llama, data_dir, interrupted, **more), crash_at=5)
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path / "empty"))  # the checkpoint must be enough
    train(tsq_settings(tiny_llama, data_dir, interrupted, **more))
    assert seen[:5] + seen[6:] == expected[:5] + expected[5:], "step 5 is trained twice"
    assert seen[4] == seen[5]
    assert adapters_equal(uninterrupted, interrupted)
    if part != "ranks":
        assert (uninterrupted / SAMPLES_FILE).read_text() == (interrupted / SAMPLES_FILE).read_text()
        assert list((tmp_path / "empty" / "quality").iterdir()) == []


def test_a_resumed_run_on_other_rows_or_options_is_refused(tiny_llama, data_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(tsq_settings(tiny_llama, data_dir, out, **SAVING), crash_at=5)
    with pytest.raises(
        PlanError, match="no qualities of these training samples: the data set, template or cutoff_len"
    ):
        train(tsq_settings(tiny_llama, data_dir, out, **SAVING, cutoff_len=40))
    with pytest.raises(PlanError, match=r"tsq_temperature is 3\.0 there and 2\.0 here"):
        train(tsq_settings(tiny_llama, data_dir, out, **{**SAVING, "tsq_temperature": 2.0}))


def test_samples_are_chosen_on_given_ranks(tiny_llama, data_dir, tmp_path):
    train(tsq_settings(tiny_llama, data_dir, tmp_path / "a"))
    plan = tmp_path / "a" / "adaptive_rank_plan.json"
    args = tsq_settings(tiny_llama, data_dir, tmp_path / "b", adaptive_plan=str(plan), **SAVING)
    with pytest.raises(KeyboardInterrupt):
        train(args, crash_at=5)
    with pytest.raises(PlanError, match=r"tsq_subset_ratio is 0\.7 there and 0\.5 here"):
        train({**args, "tsq_subset_ratio": 0.5})
    train(args)
    assert load_plan(tmp_path / "b" / "adaptive_rank_plan.json").ranks() == load_plan(plan).ranks()
    assert read_data_report(tmp_path / "b")["steps"] == 12
