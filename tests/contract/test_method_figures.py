"""What pages say of the methods is what their benchmarks recorded."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from scipy import stats

from llamafactory_adaptive.config.arguments import AdaptiveArguments
from tests.helpers.sentences import says


ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
METHODS = (ROOT / "docs" / "methods.md").read_text()
RESULTS = {
    name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["results_by_rank"]
    for name in ("method_quality", "method_quality_smollm2")
}


@pytest.fixture(scope="module")
def agreements():
    """Agreement of ranks with the first run, by method and by what was changed."""
    path = ROOT / "benchmarks" / "results" / "stability.json"
    return json.loads(path.read_text(encoding="utf-8"))["agreement_with_first_run"]


@pytest.fixture(scope="module")
def decided():
    """Losses of plain LoRA and of the default on SmolLM2, and what is said of their difference."""
    rows = RESULTS["method_quality_smollm2"]["8"]
    return rows["lora"]["losses"], rows["corrected"]["losses"], rows["corrected"]["over_lora"]


def test_the_recorded_difference_is_that_of_the_recorded_losses(decided):
    plain, default, over = decided
    differences = [b - a for a, b in zip(plain, default, strict=True)]
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    assert (over["mean"], over["low"], over["high"]) == pytest.approx((fmean(differences), low, high))
    low, high = test.confidence_interval(0.90)
    assert over["equivalent"] is bool(max(-low, high) < 0.005 * fmean(plain))


@pytest.mark.parametrize(("words", "rank", "arm", "rival", "beyond_doubt"), [
    ("that costs {:.3f} at rank 4 and", "4", "corrected, uniform ranks", "base", True),
    ("and {:.3f} at rank 2, beyond doubt, and is worse", "2", "corrected, uniform ranks", "base", True),
    ("`random ranks` are worse than plain LoRA by {:.3f} at both", "4", "random ranks", "lora", False),
    ("`random ranks` are worse than plain LoRA by {:.3f} at both", "2", "random ranks", "lora", False),
    ("`corrected, shrink` is worse than `corrected` by {:.3f}", "4", "corrected, shrink", "base", True),
    ("by {:.2f} in `corrected`, beyond doubt", "4", "corrected, shrunk to the end, not mended", "base", True),
    ("and by {:.2f} as published, which does not", "4", "published, shrunk to the end, mended", "base", False),
    ("and mending costs {:.3f} to", "4", "corrected, shrink, mended", "base", True),
    ("to {:.3f}: by default `corrected` mends", "4", "published, descaled, mended", "base", True),
    ("are better by {:.3f}, beyond doubt", "4", "published, off, no returns", "base", True),
    ("start is better by {:.3f}, which does not", "4", "published, off, LoRA's start", "base", False),
    ("(`adalora_scale: lora_rank`) by {:.3f}; after", "4", "adalora, alpha over lora_rank", "lora", False),
])  # fmt: skip
def test_the_page_of_methods_quotes_its_differences(words, rank, arm, rival, beyond_doubt):
    over = RESULTS["method_quality"][rank][arm][f"over_{rival}"]
    assert says(METHODS, words.format(abs(over["mean"])))
    assert (over["p_holm"] < 0.05) is beyond_doubt


def test_the_page_of_methods_quotes_what_ranks_from_zero_gain():
    by_rank = RESULTS["method_quality"]

    def gain(arm, rank):
        pairs = zip(by_rank[rank]["lora"]["losses"], by_rank[rank][arm]["losses"], strict=True)
        differences = [plain - other for plain, other in pairs]
        mean = fmean(differences)
        return mean, mean / stats.sem(differences)

    (four, _), (two, errors), (one, errors_of_one) = (gain("corrected, ranks from 0", rank) for rank in "421")
    default, errors_of_default = gain("corrected", "2")
    assert says(
        METHODS, f"at every budget: by {four:.3f} at rank 4, by {two:.3f} at rank 2 ({errors:.1f} standard errors)"
    )
    assert says(METHODS, f"and by {one:.3f} at rank 1 ({errors_of_one:.1f} standard errors).")
    assert says(METHODS, f"it gains {default:.3f} at rank 2 ({errors_of_default:.1f} standard errors, equivalent")
    assert all(by_rank[rank]["corrected, ranks from 0"]["over_lora"]["p_holm"] < 0.05 for rank in "421")


def test_the_page_of_methods_quotes_what_other_schedules_reach():
    rows = RESULTS["method_quality"]["4"]
    arms = (
        "corrected, warm-up 0",
        "corrected, warm-up 0.2",
        "corrected, final phase 0.1",
        "corrected, final phase 0.5",
    )
    overs = [rows[arm]["over_base"] for arm in arms]
    assert all(over["equivalent"] for over in overs)
    assert not any(rows[arm]["rate_at_the_edge"] for arm in arms)
    least, most = (figure(over["mean"] for over in overs) for figure in (min, max))
    assert says(METHODS, f"is within 0.5 % of that of `corrected`: {-least:.3f} less to {most:.3f} more")
    shares = [AdaptiveArguments.adaptive_warmup_ratio, AdaptiveArguments.adaptive_final_ratio]
    assert shares == [0.1, 0.3], "the defaults that the page names"


def test_pages_quote_the_difference_between_plain_lora_and_the_default(decided):
    plain, default, over = decided
    seeds, figures = len(plain), f"{over['mean']:+.4f}, {over['low']:+.4f} to {over['high']:+.4f}"
    assert over["p_holm"] > 0.05, "no difference is shown"
    verdict = "are equivalent within 0.5 %" if over["equivalent"] else "is not shown either"
    said = f"{seeds} seeds show no difference on SmolLM2-135M at rank 8 ({figures} in held-out loss)"
    assert says(README, said)
    low, high = stats.ttest_1samp([b - a for a, b in zip(plain, default, strict=True)], 0.0).confidence_interval(0.90)
    assert says(METHODS, f"Plain LoRA and `corrected` were run with {seeds} seeds")
    assert says(METHODS, f"the 90 % interval is {low:+.4f} to {high:+.4f}, the margin {0.005 * fmean(plain):.4f}")
    assert all(says(text, verdict) for text in (METHODS, README))


def test_the_page_of_methods_quotes_what_corrected_reaches_at_the_rate_of_lora():
    reached = []
    for model, rank in (("method_quality", "4"), ("method_quality_smollm2", "8")):
        rows = RESULTS[model][rank]
        at_loras, at_its_own = (fmean(rows["corrected"]["curve"][f"{rows[arm]['rate']:g}"])
                                for arm in ("lora", "corrected"))  # fmt: skip
        assert at_loras <= at_its_own, "it is said that one rate serves both"
        reached += [f"{at_loras:.4f}", f"{at_its_own:.4f}"]
    small, own, smollm2, own_there = reached
    rates = [RESULTS["method_quality"]["4"][arm]["rate"] for arm in ("lora", "corrected")]
    assert says(METHODS, f"best rate, {rates[0]:g}, the two seeds that choose end at {small}")
    assert says(METHODS, f"`corrected`, {rates[1]:g}, at {own}.")
    assert says(METHODS, f"ends at {smollm2} at LoRA's best rate and at {own_there} at its own")


@pytest.mark.parametrize(("method", "words"), [
    ("corrected, 12 steps", "`corrected` has {:.0f} to {:.0f} % on all three"),
    ("corrected, 80 steps", "**Over 80 steps the aim is missed: {:.0f} to {:.0f} %.**"),
    ("product", "(`igu_uncertainty: product`) with {:.0f} to {:.0f} %"),
    ("published", "and `published` with {:.0f} to {:.0f} % miss it by far"),
    ("adalora", "`adalora` with {:.0f} to {:.0f} % about as `corrected` does"),
    ("tsq, ranks alone", "`tsq` ({:.0f} to {:.0f} % between engines)"),
])  # fmt: skip
def test_the_page_of_methods_tells_how_far_engines_agree(agreements, method, words):
    shares = [100 * agreements[method][engine]["same_rank"] for engine in ("DDP", "ZeRO-2", "ZeRO-3")]
    assert says(METHODS, words.format(min(shares), max(shares)))


def test_the_page_of_methods_tells_how_far_seeds_and_steps_agree(agreements):
    after_40 = {engine: 100 * row["same_rank"] for engine, row in agreements["corrected"].items()}
    words = (
        "After 40 steps it has {DDP:.0f} % under DDP, {ZeRO-2:.0f} % under ZeRO-2 and just misses the aim under ZeRO-3"
    )
    assert says(METHODS, f"{words} with {{ZeRO-3:.0f}} %.".format_map(after_40))
    corrected, published = (agreements[method]["seed"]["correlation"] for method in ("corrected", "published"))
    assert says(METHODS, f"better than `published` between seeds ({corrected:.2f} against {published:.2f})")


@pytest.mark.parametrize("rank", ["4", "2", "1"])
@pytest.mark.parametrize("arm", ["corrected, ranks from 0", "product, ranks from 0"])
def test_plain_lora_comes_down_to_ranks_from_0_at_no_rate(rank, arm):
    """What the intervals take as given, the choice of the rate, does not explain the gain."""
    rows = RESULTS["method_quality"][rank]
    assert rows["lora"]["rate"] in map(float, rows["lora"]["curve"])
    assert all(rows[arm]["loss"] < fmean(losses) for losses in rows["lora"]["curve"].values())
    assert says(
        METHODS,
        "The gains with ranks from 0 do not come from that choice: at no budget, and at no rate of the grid, does "
        "plain LoRA's loss on the rows that judge come down to theirs.",
    )


def test_the_rate_of_the_corrected_one_on_smollm2_is_said_to_be_chance():
    rows = RESULTS["method_quality_smollm2"]["8"]
    (own,), (other,) = (rows["corrected"]["curve"][rate] for rate in ("0.002", "0.004"))
    assert rows["corrected"]["rate"] == 0.002
    assert own - other > 0.005 * fmean(rows["lora"]["losses"]), "more than the margin of the equivalence"
    assert says(
        METHODS,
        f"`corrected` reaches {other:.4f} at 0.004 and {own:.4f} at its own 0.002, which is more than the margin. "
        "Whether both are equivalent at their best rates is open.",
    )
    assert says(README, "at these rates they are equivalent within 0.5 %, and whether at the best ones is open")
