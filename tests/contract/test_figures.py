"""README quotes what the result files hold, and the result files say how they came about."""

import json
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}


ROWS = {
    "questions per second of the harness": ("eval_throughput", "throughput_ratio", "{:.2f} x"),
    "log-probabilities in vLLM 0.32 against PEFT": ("export_parity", "vllm_vllm", "{:.0e} nats"),
    "log-probabilities in vLLM 0.31 against PEFT": ("export_parity", "vllm_vllm_legacy", "{:.0e} nats"),
    "peak memory of merging over the base": ("export_parity", "merging_over_base", "{:.2f} x"),
    "scoring all samples over an epoch": ("quality_pass", "over_epoch", "{:.2f} x"),
    "the same, over an epoch sorted by length": ("quality_pass", "over_sorted_epoch", "{:.2f} x"),
    "one backward pass per sample over scoring, the same": ("quality_pass", "per_sample_over_scoring", "{:.1f} x"),
    "the same, with backward passes on plain LoRA": ("quality_pass", "plain_per_sample_over_scoring", "{:.1f} x"),
    "one backward pass per sample over scoring, long rows": (
        "quality_pass_gsm8k",
        "per_sample_over_scoring",
        "{:.1f} x",
    ),
    "gradient norms against one backward pass per sample": ("quality_pass", "largest_norm_error", "{:.0e}"),
    "shuffled answers by quality": ("planted", "order/quality/AUC", "AUC {:.2f}"),
    "shuffled answers by loss": ("planted", "order/loss/AUC", "AUC {:.2f}"),
    "shuffled answers in subsets, nothing clipped": (
        "planted",
        "share_in_subsets/by loss, subset_ratio 0.7, clip_quantile 1",
        "{:.1%}",
    ),
    "shuffled answers in subsets, `tsq_clip_quantile: 0.9`": (
        "planted",
        "share_in_subsets/by loss, subset_ratio 0.7, clip_quantile 0.9",
        "{:.1%}",
    ),
    "shuffled answers in subsets, `tsq_clip_quantile: 0.8`": (
        "planted",
        "share_in_subsets/by loss, subset_ratio 0.7, clip_quantile 0.8",
        "{:.1%}",
    ),
    "held-out loss, `sensitivity` less plain LoRA": ("worth_it", "results/sensitivity/over_lora/mean", "{:+.4f}"),
    "the same, `tsq` with ranks alone": ("worth_it", "results/tsq, ranks alone/over_lora/mean", "{:+.4f}"),
    "the same, `random`": ("worth_it", "results/random/over_lora/mean", "{:+.4f}"),
    "step of `igu` over plain LoRA": ("overhead", "variants/igu/time_ratio", "{:.3f} x"),
    "step of `adalora` over plain LoRA": ("overhead", "variants/adalora/time_ratio", "{:.3f} x"),
    "step of PEFT's own AdaLoRA over plain LoRA": ("overhead", "variants/peft adalora/time_ratio", "{:.3f} x"),
    "step of plain LoRA over itself": ("overhead", "variants/uniform again/time_ratio", "{:.3f} x"),
    "step of `igu` with `integrated` and `adaptive_max_overhead: 0.2`": (
        "overhead",
        "variants/igu integrated at most 20 %/time_ratio",
        "{:.3f} x",
    ),
    "peak memory of `igu` over plain LoRA": ("overhead", "variants/igu/memory_ratio", "{:.3f} x"),
    "peak memory of plain LoRA over itself": ("overhead", "variants/uniform again/memory_ratio", "{:.3f} x"),
    "modules at the same rank under DDP": ("engines", "runs/DDP, 2 processes/same_rank", "{:.1%}"),
    "modules at the same rank under ZeRO-1": ("engines", "runs/ZeRO-1, 2 processes/same_rank", "{:.1%}"),
    "modules at the same rank under ZeRO-2": ("engines", "runs/ZeRO-2, 2 processes/same_rank", "{:.1%}"),
    "modules at the same rank under ZeRO-3": ("engines", "runs/ZeRO-3, 2 processes/same_rank", "{:.1%}"),
    "modules at the same rank, killed": ("engines", "runs/killed and resumed/same_rank", "{:.1%}"),
    "scoring over one forward pass of the same tokens": ("calibration", "time_ratio", "{:.2f} x"),
    "the same, over a forward pass that also skips the output head": (
        "calibration",
        "time_ratio_without_head",
        "{:.2f} x",
    ),
    "peak memory of scoring over a forward pass |": ("calibration", "memory_ratio", "{:.2f} x"),
    "peak memory of scoring over a forward pass that": ("calibration", "memory_ratio_without_head", "{:.2f} x"),
    "Kendall's tau of scores": ("calibration", "tau", "{:.3f}"),
    "scores against a recomputation": ("recomputation", "theta_largest_relative_difference", "{:.1%}"),
    "Kendall's tau between scores and ranks": ("recomputation", "tau_theta_ranks", "{:.2f}"),
    "rank against its water-filled": ("recomputation", "largest_distance_from_water_filled_share", "{:.2f} ranks"),
}


@pytest.mark.parametrize("row", list(ROWS))
def test_readme_quotes_the_results(row):
    benchmark, key, pattern = ROWS[row]
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    found = RESULTS[benchmark]
    for part in key.split("/") if "/" in key else ("results", key):
        found = found[part]
    assert line.split("|")[2].strip() == pattern.format(found)


@pytest.mark.parametrize("name", list(RESULTS))
def test_results_name_command_date_and_versions(name):
    result = RESULTS[name]
    assert result["command"].startswith(("python benchmarks/", "make "))
    assert result["date"]
    ours = (
        {"lm_eval", "torch"}
        if name.startswith("eval_")
        else {"llamafactory", "torch", "peft", "llamafactory-adaptive"}
    )
    assert set(result["versions"]) >= ours


def test_verdicts_of_readme_are_those_of_the_comparison():
    for method in ("sensitivity", "tsq, ranks alone", "random"):
        assert RESULTS["worth_it"]["results"][method]["verdict"] == "no difference shown"


def test_ranks_of_smollm2_grew_and_shrank_within_the_budget():
    for run in RESULTS["worth_it"]["runs"]["tsq, ranks alone"]["5e-4"]:
        assert len(run["allocations"]) == 3
        for found in run["allocations"]:
            assert 0 <= found["budget_asked"] - found["budget_used"] < 768  # the cheapest rank of its modules
            assert min(found["grown"], found["shrunk"]) > 0


def test_clipping_reduces_the_share_of_planted_wrong_answers():
    shares = RESULTS["planted"]["share_in_subsets"]
    for ratio in ("0.7", "0.3"):
        by_quantile = [shares[f"by loss, subset_ratio {ratio}, clip_quantile {q}"] for q in ("1", "0.9", "0.8", "0.7")]
        assert by_quantile == sorted(by_quantile, reverse=True)
        assert by_quantile[-1] < 0.7 * by_quantile[0]
