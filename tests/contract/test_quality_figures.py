"""What pages say in words of the benchmark of methods is what its records hold."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest
from scipy import stats


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def decided():
    """Losses of plain LoRA and of the default on SmolLM2, and what is said of their difference."""
    record = json.loads((ROOT / "benchmarks/results/method_quality_smollm2.json").read_text(encoding="utf-8"))
    rows = record["results_by_rank"]["8"]
    return rows["lora"]["losses"], rows["corrected"]["losses"], rows["corrected"]["over_lora"]


def text_of(page):
    return re.sub(r"\s+", " ", (ROOT / page).read_text(encoding="utf-8"))


def test_the_recorded_difference_is_that_of_the_recorded_losses(decided):
    plain, default, over = decided
    differences = [b - a for a, b in zip(plain, default, strict=True)]
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    assert (over["mean"], over["low"], over["high"]) == pytest.approx((fmean(differences), low, high))
    low, high = test.confidence_interval(0.90)
    assert over["equivalent"] is bool(max(-low, high) < 0.005 * fmean(plain))


def test_pages_quote_the_difference_between_plain_lora_and_the_default(decided):
    plain, default, over = decided
    seeds, figures = len(plain), f"{over['mean']:+.4f}, {over['low']:+.4f} to {over['high']:+.4f}"
    assert over["p_holm"] > 0.05, "no difference is shown"
    verdict = "are equivalent within 0.5 %" if over["equivalent"] else "is not shown either"
    said = f"{seeds} seeds show no difference on SmolLM2-135M at rank 8 ({figures} in held-out loss)"
    assert said in text_of("README.md")
    low, high = stats.ttest_1samp([b - a for a, b in zip(plain, default, strict=True)], 0.0).confidence_interval(0.90)
    page = text_of("docs/methods.md")
    assert f"Plain LoRA and `corrected` were run with {seeds} seeds" in page
    assert f"the 90 % interval is {low:+.4f} to {high:+.4f}, the margin {0.005 * fmean(plain):.4f}" in page
    assert all(verdict in text for text in (page, text_of("README.md")))
