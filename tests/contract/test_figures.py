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
    "held-out loss, `sensitivity` as published less plain LoRA": (
        "worth_it",
        "results/sensitivity/over_lora/mean",
        "{:+.4f}",
    ),
    "the same, `tsq` with ranks alone": ("worth_it", "results/tsq, ranks alone/over_lora/mean", "{:+.4f}"),
    "the same, `random`": ("worth_it", "results/random/over_lora/mean", "{:+.4f}"),
    "step of `igu` over plain LoRA": ("overhead", "variants/igu/time_ratio", "{:.3f} x"),
    "step of `adalora` over plain LoRA": ("overhead", "variants/adalora/time_ratio", "{:.3f} x"),
    "step of `tsq` with ranks alone over plain LoRA": ("overhead", "variants/tsq ranks alone/time_ratio", "{:.3f} x"),
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
    figure = RESULTS[benchmark]
    for part in key.split("/") if "/" in key else ("results", key):
        figure = figure[part]
    assert line.split("|")[2].strip() == pattern.format(figure)


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


WORTH_IT = RESULTS["worth_it"]
COMPARED = {
    "held-out loss, `sensitivity` as published less plain LoRA": "sensitivity",
    "the same, `tsq` with ranks alone": "tsq, ranks alone",
    "the same, `random`": "random",
}


def says(document, sentence):
    """Whether a page holds a sentence, wherever its lines are broken."""
    return sentence in " ".join(document.split())


@pytest.mark.parametrize("row", list(COMPARED))
def test_verdicts_of_readme_are_those_of_the_comparison(row):
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row}")]
    result = WORTH_IT["results"][COMPARED[row]]
    words = line.split("|")[1].partition("(")[2].rstrip(" )")
    assert words.split("; ")[-1] == result["verdict"]
    assert (result["verdict"] == "no difference shown") is (result["over_lora"]["p_holm"] >= 0.05)
    if "steps" in words:
        assert words.startswith(f"{WORTH_IT['steps']} steps, {WORTH_IT['seeds']} seeds;")


def test_readme_says_what_the_comparison_was_and_what_came_of_it():
    rates = WORTH_IT["command"].partition("--rates ")[2].split()[0].split(",")
    assert len(rates) == 1
    steps, size, seeds, rows = (WORTH_IT[key] for key in ("steps", "batch_size", "seeds", "held_out"))
    assert says(
        README,
        f"(SmolLM2-135M, {steps} steps of {size} GSM8K rows, one learning rate, {seeds} seeds, {rows} held-out rows): "
        "no method differs from plain LoRA after correction, and the 95 % interval of `tsq` lies on the wrong side.",
    )
    intervals = {name: (of["over_lora"]["low"], of["over_lora"]["high"])
                 for name, of in WORTH_IT["results"].items() if name != "lora"}  # fmt: skip
    assert {name for name, (low, _) in intervals.items() if low > 0} == {"tsq, ranks alone"}
    assert all(low < 0 < high for name, (low, high) in intervals.items() if name != "tsq, ranks alone")


def test_ranks_grew_and_shrank_and_cost_at_most_plain_lora_as_readme_says():
    assert "| `tsq` | while training, growing and shrinking |" in README
    assert says(README, "the adapter costs at most what a uniform LoRA of that rank costs on the same modules")
    most = WORTH_IT["results"]["lora"]["parameters"]
    assert all(result["parameters"] <= most for result in WORTH_IT["results"].values())
    changes = [line for run in WORTH_IT["runs"]["tsq, ranks alone"]["5e-4"] for line in run["allocations"]]
    assert changes
    assert all(line["grown"] and line["shrunk"] and line["budget_used"] <= most for line in changes)


def test_the_default_transform_is_the_one_that_the_rule_chose():
    chosen = RESULTS["sensitivity_transforms"]["rule"]["chosen"]
    assert f"| `sensitivity_transform` | `{chosen}` |" in (ROOT / "docs" / "options.md").read_text()


def test_how_to_quotes_what_the_transforms_spend_and_how_they_agree():
    page = (ROOT / "docs" / "how-to.md").read_text()
    models = RESULTS["sensitivity_transforms"]["spending"]
    starts = {"SmolLM2-135M": "SmolLM2-135M, 210 modules", "gemma-3-270m": "gemma-3-270m, 126 modules",
              "small": "a small Qwen3 made by the benchmark, 28 modules"}  # fmt: skip
    assert set(models) == set(starts)
    for model, figures in models.items():
        cells = [f"{figures[reading]['top_three']:.1%}, {figures[reading]['data_sets']['scores']:.2f}"
                 for reading in ("none", "log", "per_type")]  # fmt: skip
        assert f"| {starts[model]} | {' | '.join(cells)} |" in page
    assert min(figures[reading]["halves"]["scores"] for figures in models.values() for reading in figures) >= 0.99
    first = [
        f"{models[model]['no_first_token']['top_three']:.1%} on {model}" for model in ("SmolLM2-135M", "gemma-3-270m")
    ]
    assert says(page, f"still hold {first[0]} and {first[1]}.")
    trained = RESULTS["sensitivity_transforms"]["quality"]["SmolLM2-135M"]["arms"]
    names = {
        "uniform": "uniform ranks",
        "random": "random",
        "per_type": "`per_type`",
        "log": "`log`",
        "none": "`none`",
    }
    assert says(page, ", ".join(f"{name} {trained[arm]['loss']:.4f}" for arm, name in names.items()))
    over = trained["log"]["over_uniform"]
    assert says(page, f"({over['mean']:+.4f}, {over['low']:+.4f} to {over['high']:+.4f})")
    better = [
        arm
        for rows in RESULTS["sensitivity_transforms"]["quality"].values()
        for arm, row in rows["arms"].items()
        if arm not in ("uniform", "random")
        and "better" in row["over_uniform"]["verdict"] + row["over_random"]["verdict"]
    ]
    assert better == [], "how-to says that none was"
    raw, chosen = (models["SmolLM2-135M"][reading]["top_three"] for reading in ("none", "log"))
    assert says(README, f"hold {100 * raw:.0f} % of the paper's raw score (`sensitivity_transform: none`) and "
                        f"{100 * chosen:.0f} % with the default")  # fmt: skip


def test_how_to_quotes_what_scoring_takes_of_large_models():
    page, planning = (ROOT / "docs" / "how-to.md").read_text(), RESULTS["planning"]
    for model, figures in planning["large_models"].items():
        counted, milliseconds = figures["arithmetic"], figures["python_microseconds_per_module_and_batch"] / 1000
        cells = [
            f"{figures['modules']:,}",
            f"{figures['statistics_megabytes']:.0f} MB",
            f"{figures['modules'] * milliseconds:.0f} ms",
            f"{counted['forward_petaflop_of_128_samples_of_512']:.1f}",
            f"{counted['base_gigabytes_bf16']:.0f} GB, {counted['base_gigabytes_4bit']:.0f} GB",
            f"{counted['gigabytes_of_inputs_held_by_a_backward_pass']:.0f} GB",
            f"{counted['gora_ranks_gigabytes_of_host_memory']:,.0f} GB",
        ]
        assert f"| {model} | {' | '.join(cells)} |" in page
        assert figures["syncs_per_batch"] == 2
    few, many = (planning["python_microseconds_per_module_and_batch"][count] for count in ("5000", "50000"))
    assert says(page, f"{few:.0f} microseconds with 5,000 of them and {many:.0f} with 50,000")
    assert many < 1.5 * few


def test_footguns_quotes_what_floors_keep_of_the_kind_that_quality_starves():
    guard, page = RESULTS["diversity_guard"], (ROOT / "docs" / "footguns.md").read_text()
    rows = {floor: guard["results"][f"subset_ratio 0.3, min_cluster_share {floor}"] for floor in ("0", "0.5", "1")}
    starved = min(guard["pool"], key=lambda kind: rows["0"]["subset"][kind] / guard["pool"][kind])
    assert says(page, f"Of {guard['samples']} rows, half of GSM8K and half of BoolQ")
    assert starved == "gsm8k"
    for words, floor in (("by quality alone GSM8K is", "0"), ("with a floor of 0.5", "0.5"), ("with one of 1", "1")):
        share = f"{rows[floor]['subset'][starved]:.0%}".replace("%", " %")
        assert says(page, f"{words} {share} of the subsets"), floor


def test_footguns_quotes_how_well_wrong_answers_are_told_apart():
    planted, page = RESULTS["planted"], (ROOT / "docs" / "footguns.md").read_text()
    quality, loss = (planted["order"][term]["AUC"] for term in ("quality", "loss"))
    assert says(page, f"With {planted['share']:.0%} of {planted['samples']} GSM8K".replace("%", " %"))
    assert says(page, f"hardly better than chance (AUC {quality:.2f}")
    assert says(page, f"the loss does better (AUC {loss:.2f}). That is why `tsq_clip_quantile` goes by the loss: 0.8 "
                      "brings the share of shuffled rows in the subsets down")  # fmt: skip
    shares = planted["share_in_subsets"]
    for ratio in ("0.7", "0.3"):
        unclipped, by_loss, by_norm = (
            shares[f"by {term}, subset_ratio {ratio}, clip_quantile {quantile}"]
            for term, quantile in (("loss", "1"), ("loss", "0.8"), ("gradient_norm", "0.8"))
        )
        assert by_loss < by_norm < unclipped
