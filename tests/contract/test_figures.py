"""Pages quote what the result files hold, and the result files say how they came about."""

import re
from collections import Counter

import pytest

from tests.helpers.benchmarks import import_benchmarks
from tests.helpers.recorded import PAGE, README, RESULTS, ROOT
from tests.helpers.sentences import says


def figures(text):
    """The rows of the table of figures of a page, each as its cells."""
    table = re.search(r"^\| [^|]+ \| [^|]+ \| [^|]+ \|\n\| --- \| --- \| --- \|\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table[1].splitlines()]


def part_on_figures(text, heading):
    return text[text.index(f"\n## {heading}\n") :]


def test_the_page_has_every_figure_and_readme_some_of_them():
    rows = figures(PAGE)
    assert len({what for what, *_ in rows}) > 30, "a row is there once but for `the same`"
    quoted = figures(part_on_figures(README, "Figures"))
    assert len(quoted) == 6
    assert set(quoted) <= set(rows)
    assert says(README, f"All {len(rows)}, with their conditions and commands, are in")


@pytest.mark.parametrize(("row", "written"), [("scoring over one forward pass of the same tokens", "{:.2f} x"),
                                              ("step of `igu` over plain LoRA", "{:.3f} x")])  # fmt: skip
def test_readme_quotes_the_results(row, written):
    benchmark = {"scoring": RESULTS["calibration"]["results"]["time_ratio"],
                 "step": RESULTS["overhead"]["variants"]["igu"]["time_ratio"]}  # fmt: skip
    (figure,) = [figure for what, figure, _ in figures(part_on_figures(README, "Figures")) if what.startswith(row)]
    assert figure == written.format(benchmark[row.split()[0]])


def numbers(text):
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def test_the_chinese_readme_says_the_same_with_the_same_figures_commands_and_links():
    chinese = (ROOT / "README_zh.md").read_text(encoding="utf-8")
    english = re.sub(r"<!-- answer -->.*<!-- end of answer -->", "", README, flags=re.DOTALL)
    assert numbers(chinese) == numbers(english)
    values = [[figure for _, figure, _ in figures(part_on_figures(*page))]
              for page in ((english, "Figures"), (chinese, "数据"))]  # fmt: skip
    assert values[0] == values[1]
    parts = (re.compile(r"^(#+) ", re.MULTILINE), re.compile(r"^```(\w+)$", re.MULTILINE))
    assert all(part.findall(english) == part.findall(chinese) for part in parts)
    code = [[re.sub(r"\s*# .*", "", block) for block in re.findall(r"^```(.*?)^```$", page, re.DOTALL | re.MULTILINE)]
            for page in (english, chinese)]  # fmt: skip
    assert code[0] == code[1]
    links = [set(re.findall(r"\]\(([^)#\s]+)", page)) for page in (english, chinese)]
    assert links[0] ^ links[1] == {"README.md", "README_zh.md"}


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
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    assert says(tutorial, f"hold {100 * raw:.0f} % of the paper's raw score (`sensitivity_transform: none`), and "
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


@pytest.fixture(scope="module")
def many_modules():
    return import_benchmarks("many_modules")["many_modules"]


def test_time_by_the_number_of_targets_is_linear_as_it_was_recorded(many_modules):
    recorded = RESULTS["many_modules"]
    rows = {int(count): row for count, row in recorded["seconds"].items()}
    assert recorded["over_linear"] == pytest.approx(many_modules.over_linear(rows))
    assert max(recorded["over_linear"].values()) <= recorded["most_over_linear"] == many_modules.MOST_OVER_LINEAR


@pytest.mark.parametrize(("power", "expected"), [(1, 1.0), (2, 40.0)])
def test_growth_is_told_over_the_whole_range(many_modules, power, expected):
    rows = {count: {"build": count**power / 1e3} for count in (500, 1000, 20000)}
    assert many_modules.over_linear(rows) == pytest.approx({"build": expected})


def test_how_to_quotes_how_long_a_cut_takes():
    cut, page = RESULTS["shrink"]["results"], (ROOT / "docs" / "how-to.md").read_text()
    assert says(page, f"rank {cut['rank']}, is cut in {cut['seconds']:.0f} s on {cut['threads']} cores")
