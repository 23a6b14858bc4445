"""README, how-to and the page on methods quote what comparisons with plain LoRA on SmolLM2-135M found."""

import json
from itertools import pairwise

import pytest

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.comparison.results import ArmResult
from tests.helpers.benchmarks import import_benchmarks
from tests.helpers.recorded import COMPARING, HOW_TO, METHODS, PAGE, README, RESULTS, RESULTS_DIR, ROOT
from tests.helpers.sentences import says


_bootstrap.install()
from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402


WORTH_IT = RESULTS["worth_it_data_limited"]
SEEDS = WORTH_IT["comparison"]["design"]["seeds"]
ARMS = {arm["name"]: arm for arm in WORTH_IT["comparison"]["arms"]}
OVER_LORA = {name: arm["verdicts"]["lora"] for name, arm in ARMS.items() if name != "lora"}
COMPARED = {
    "held-out loss, `sensitivity` over plain LoRA": "sensitivity",
    "the same, `igu` (": "igu",
    "the same, `tsq` with ranks alone (": "tsq_ranks",
    "the same, `random` (": "random",
}


@pytest.mark.parametrize("row", list(COMPARED))
def test_verdicts_of_the_page_are_those_of_the_comparison(row):
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row}")]
    words = line.split("|")[1].partition("(")[2].rstrip(" )")
    judged = OVER_LORA[COMPARED[row]]
    assert words.split("; ")[-1] == judged["verdict"]
    assert (judged["verdict"] in ("better", "worse")) is (judged["p_holm"] < 0.05)
    if "steps" in words:
        assert words.startswith(f"few rows, {WORTH_IT['steps']} steps, {SEEDS} seeds;")


def test_readme_says_what_the_comparison_was_and_what_came_of_it():
    assert [verdict["verdict"] for verdict in OVER_LORA.values()] == ["not decided"] * 9
    intervals = {name: OVER_LORA[name]["difference"]["relative"] for name in OVER_LORA}
    low = 100 * min(of["low"] for of in intervals.values())
    high = 100 * max(of["high"] for of in intervals.values())
    assert [name for name, of in intervals.items() if of["low"] > 0] == ["adalora"]
    assert all(of["high"] > 0 for of in intervals.values())
    steps, size, rank = (WORTH_IT[key] for key in ("steps", "batch_size", "rank"))
    judging = WORTH_IT["comparison"]["held_out_rows"]["test"]
    assert says(
        README,
        f"{steps} steps of {size}, rank {rank}, {SEEDS} seeds, {judging} rows that judge; table below): "
        "none is shown to be better, nothing is decided. The 95 % intervals lie between "
        f"{low:.1f} % and {high:+.1f} %; that of `adalora` lies wholly on the "
        "wrong side, which does not hold up after correction for nine arms",
    )


def test_how_to_says_what_the_transforms_reach_at_their_own_best_rates():
    none, log = (OVER_LORA[name]["difference"]["relative"] for name in ("sensitivity_none", "sensitivity"))
    assert ARMS["sensitivity_none"]["settings"]["sensitivity_transform"] == "none"
    told = [[f"{100 * of[key]:+.2f}" for key in ("value", "low", "high")] for of in (none, log)]
    (value, low, high), (other, lowest, highest) = told
    assert says(
        HOW_TO,
        f"on few rows of GSM8K, `none` reaches {value} % against plain LoRA ({low} to {high} %) and `log` {other} % "
        f"({lowest} to {highest} %), neither of them decided",
    )


CAPACITY = RESULTS["worth_it_capacity_limited"]
CAPACITY_2 = RESULTS["worth_it_capacity_limited_rank2"]
AT_RANK_1, AT_RANK_2 = ({arm["name"]: arm for arm in of["comparison"]["arms"]} for of in (CAPACITY, CAPACITY_2))


def test_readme_and_methods_say_what_came_of_a_budget_of_rank_1():
    made = CAPACITY["comparison"]
    verdicts = {name: arm["verdicts"]["lora"] for name, arm in AT_RANK_1.items() if name != "lora"}
    assert {name: verdict["verdict"] for name, verdict in verdicts.items()} == dict.fromkeys(
        ("random", "sensitivity", "igu", "svd"), "not decided"
    )
    over = {name: verdict["difference"]["relative"] for name, verdict in verdicts.items()}
    assert (made["settings"]["lora_rank"], made["settings"]["adaptive_min_rank"]) == (1, 0)
    value = {name: f"{100 * of['value']:+.2f} %" for name, of in over.items()}
    low, high = (f"{100 * over['igu'][end]:+.2f}" for end in ("low", "high"))
    assert [name for name, of in over.items() if of["low"] > 0] == ["svd"]
    of_svd = f"{100 * over['svd']['low']:+.2f} % to {100 * over['svd']['high']:+.2f} %"
    assert says(
        README,
        f"Four arms at rank {CAPACITY['rank']} on more rows (a module may have none, {CAPACITY['steps']} steps of "
        f"{CAPACITY['batch_size']}, {made['design']['seeds']} seeds, {made['held_out_rows']['test']} rows that "
        f"judge): none is shown to be better, nothing is decided. `random` reaches {value['random']}, `sensitivity` "
        f"{value['sensitivity']}, `igu` {value['igu']} ({low} % to {high} %), `svd` {value['svd']} ({of_svd}), which "
        "does not hold up after correction for four arms.",
    )
    assert says(METHODS, f"igu's held-out loss is {value['igu']} of plain LoRA's over {made['design']['seeds']} seeds "
                         f"at rank 1 ({low} to {high} %, not decided)")  # fmt: skip


def test_readme_and_methods_say_what_came_of_a_budget_of_rank_2_and_that_rank_is_short():
    plain, settings, others = AT_RANK_2["lora"], CAPACITY_2["comparison"]["settings"], ["random", "igu"]
    assert list(AT_RANK_2) == ["lora", *others]
    assert (settings["lora_rank"], settings["adaptive_min_rank"]) == (2, 0)
    assert [AT_RANK_2[name]["verdicts"]["lora"]["verdict"] for name in others] == ["not decided"] * 2
    over_lora, over_random = (AT_RANK_2["igu"]["verdicts"][rival]["difference"]["relative"] for rival in
                              ("lora", "random"))  # fmt: skip
    value, low, high = (f"{100 * over_lora[key]:+.2f}" for key in ("value", "low", "high"))
    verdicts = [arm["verdicts"]["random"]["verdict"] for name, held in RESULTS.items() if name.startswith("worth_it_")
                for arm in held["comparison"]["arms"] if "random" in arm.get("verdicts", {})]  # fmt: skip
    assert (AT_RANK_2["igu"]["verdicts"]["random"]["verdict"], verdicts.count("better")) == ("better", 1)
    by, least, most = (f"{100 * over_random[key]:+.2f} %" for key in ("value", "low", "high"))
    assert AT_RANK_2["igu"]["verdicts"]["random"]["p_holm"] * len(verdicts) > 0.05
    assert (plain["seeds"], CAPACITY_2["comparison"]["held_out_rows"]) == (
        AT_RANK_1["lora"]["seeds"], CAPACITY["comparison"]["held_out_rows"])  # fmt: skip
    less = f"{100 * (1 - plain['loss'] / AT_RANK_1['lora']['loss']):.1f} %"
    pairs = zip(plain["losses"], AT_RANK_1["lora"]["losses"], strict=True)
    shares = [f"{100 * (1 - at_2 / at_1):.1f} %" for at_2, at_1 in pairs]
    assert says(
        README,
        f"Nor at rank 2, where `igu` reaches {value} % ({low} % to {high} %). It is better than `random` there ({by}, "
        f"{least} to {most}), which does not hold up among all {len(verdicts)} comparisons with random ranks here. "
        f"Rank is short: plain LoRA's loss is {less} lower at rank 2 than at rank 1 ({min(shares)} to {max(shares)}, "
        "by seed).",
    )
    assert says(METHODS, f"(plain LoRA's loss is {less} lower at rank 2 than at 1)")
    assert says(METHODS, f"and {value} % at rank 2 ({low} to {high} %, not decided;")


def test_how_to_names_the_best_rates_at_rank_1():
    assert not any(arm["best_at_the_edge"] for arm in AT_RANK_1.values())
    assert CAPACITY["comparison"]["design"]["rate_seeds"] == 1
    rates = {name: arm["best"]["rate"] for name, arm in AT_RANK_1.items()}
    assert rates == {**dict.fromkeys(("lora", "random", "sensitivity", "svd"), 0.008), "igu": 0.016}
    assert {arm["best"]["rate"] for arm in AT_RANK_2.values()} == {0.008}
    assert not any(arm["best_at_the_edge"] for arm in AT_RANK_2.values())
    assert says(
        HOW_TO,
        "At rank 1 with ranks from 0 and more rows they were 0.008 for plain LoRA, `random`, `sensitivity` and `svd`, "
        "and 0.016 for `igu`; at rank 2 0.008 for plain LoRA, `random` and `igu`.",
    )


def test_what_the_choice_of_rates_takes_from_the_verdicts_is_what_the_page_on_comparing_says(monkeypatch):
    otherwise, shipped = [], import_benchmarks("shipped")["shipped"]
    monkeypatch.setattr(ArmResult, "_curve", lambda *_: None)
    for name in RESULTS:
        if name.startswith("worth_it_"):
            fresh = shipped.recomputed(*shipped.read(name))
            for arm in fresh["arms"]:
                if arm["name"] != "lora" and (said := arm["verdicts"]["lora"]["verdict"]) != "not decided":
                    otherwise.append((name, arm["name"], said))
    assert otherwise == [("worth_it_arc", "sensitivity", "better")]
    assert says(
        COMPARING,
        "In our own records one such verdict would have been `sensitivity` better on ARC, where nothing is learned at "
        "all.",
    )


def test_how_to_names_the_best_rates_of_the_comparison():
    rates: dict[float, set[str]] = {}
    for name, arm in ARMS.items():
        assert not arm["best_at_the_edge"]
        rates.setdefault(arm["best"]["rate"], set()).add(name)
    at_best = {"lora", "sensitivity", "sensitivity_none", "by_type", "igu", "tsq_ranks", "svd"}
    assert rates == {0.004: at_best, 0.002: {"random"}, 0.016: {"adalora", "elalora"}}
    tried = [point["rate"] for point in ARMS["adalora"]["curve"]]
    assert all(high == 2 * low for low, high in pairwise(tried))
    assert WORTH_IT["comparison"]["design"]["rate_seeds"] == 1
    assert says(
        HOW_TO,
        "of rates that each double the last, best were 0.004 for plain LoRA, `sensitivity` (with `log` and with "
        "`none`), `by_type`, `igu`, `tsq` with ranks alone and `svd`, half of it for random ranks, and 0.016 for "
        "`adalora` and `elalora`, the two whose first updates are smallest in the table.",
    )
    small = RESULTS["method_quality"]["results_by_rank"]["4"]
    assert (small["lora"]["rate"], small["adalora"]["rate"]) == (0.016, 0.032)
    assert says(HOW_TO, "twice LoRA's 0.016 on a small Llama at rank 4 (`adalora`)")


def test_ranks_grew_and_shrank_and_cost_at_most_plain_lora_as_readme_says():
    assert "| `tsq` | while training, growing and shrinking |" in README
    assert says(README, "the adapter costs at most what a uniform LoRA of that rank costs on the same modules")
    assert all(arm["parameters"] <= ARMS["lora"]["parameters"] for arm in ARMS.values())
    means = ARMS["tsq_ranks"]["mean_ranks"].values()  # it begins at equal ranks
    assert min(means) < WORTH_IT["rank"] < max(means)
    lines = (RESULTS_DIR / "worth_it_data_limited.ledger.jsonl").read_text().splitlines()
    ranks = [line["result"]["ranks"] for line in map(json.loads, lines) if line["settings"]["arm"] == "tsq_ranks"]
    assert len(ranks) == len(ARMS["tsq_ranks"]["curve"]) + SEEDS
    assert all(min(of_run) < WORTH_IT["rank"] < max(of_run) for of_run in ranks)


def test_alpha_was_twice_the_rank_in_all_of_them_and_adalora_half_as_strong_as_how_to_and_methods_say():
    untold = {"lora_alpha", "adalora_scale", "adaptive_init_rank"}
    for made in (held["comparison"] for name, held in RESULTS.items() if name.startswith("worth_it_")):
        assert made["design"]["alphas"] == [None], "not tuned"
        assert not untold & {key for of in (made, *made["arms"]) for key in of["settings"]}, "the defaults were taken"
    settings = {"finetuning_type": "adaptive", "lora_rank": 8, "stage": "sft", "do_train": True, "output_dir": "any",
                "model_name_or_path": "any", "dataset": "gsm8k", "max_steps": 100,
                "dataset_dir": str(ROOT / "examples" / "data")}  # fmt: skip
    scales = {name: parse_config({**settings, "adaptive_method": name}).scale for name in ("uniform", "adalora")}
    assert scales == {"uniform": 2.0, "adalora": 1.0}
    assert says(HOW_TO, "`lora_alpha` was 2 x the rank, LLaMA-Factory's default, and was not tuned")
    assert says(HOW_TO, "its scale alpha/r was half of plain LoRA's")
    assert says(METHODS, "`lora_alpha` is 2 x the rank in every arm, here and on SmolLM2-135M, and was not tuned.")
    assert says(METHODS, "so that its scale is half of plain LoRA's; \"alpha over lora_rank\" is LoRA's scale.")
