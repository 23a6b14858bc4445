"""Figures, tables and files."""

import dataclasses
import json
import math
import statistics
from types import SimpleNamespace

import pytest

from eval import report, results
from eval.protocols import load_tasks


def samples(task, metric, *rounds):
    """One sample per row and seed."""
    return [
        SimpleNamespace(task=task, seed=seed, row=row, repeat=0, extracted={}, metrics={metric: value})
        for seed, values in enumerate(rounds)
        for row, value in enumerate(values)
    ]


@pytest.fixture
def answers():
    easy, hard = load_tasks("llm_adapters", ["arc_easy", "arc_challenge"])
    made = []
    for name, first, second in (("base", [1, 0, 0, 0], [0, 0, 1, 1]), ("tuned", [1, 1, 1, 0], [0, 1, 1, 1])):
        both = samples("arc_easy", "acc", first) + samples("arc_challenge", "acc", second)
        made += results.gather(name, "base" if name == "base" else "merged", [easy, hard], both)
    return made


def test_scores_and_means(answers):
    scores = results.scores(answers)
    assert [(s.model, s.task, s.value, s.n) for s in scores] == [
        ("base", "arc_easy", 0.25, 4), ("base", "arc_challenge", 0.5, 4),
        ("tuned", "arc_easy", 0.75, 4), ("tuned", "arc_challenge", 0.75, 4)]  # fmt: skip
    assert scores[0].stderr == pytest.approx(0.25)
    assert [m["value"] for m in results.means(answers)] == [0.375, 0.75]


def test_comparison_pairs_rows(answers):
    (comparison,) = results.comparisons(answers)
    assert (comparison["first"], comparison["second"]) == ("base", "tuned")
    assert comparison["mean_difference"]["value"] == pytest.approx(0.375)
    easy, hard = comparison["tasks"]
    assert (easy["only_first"], easy["only_second"], easy["p_value"]) == (0, 2, 0.5)
    assert (hard["only_first"], hard["only_second"], hard["p_value"]) == (0, 1, 1.0)


def test_seeds_are_averaged_per_row_and_compared_one_by_one():
    (task,) = load_tasks("llm_adapters", ["gsm8k"])
    a = results.gather("a", "base", [task], samples("gsm8k", "acc", [1, 0], [0, 0]))
    b = results.gather("b", "merged", [task], samples("gsm8k", "acc", [1, 1], [1, 1]))
    assert [(s.value, s.n) for s in results.scores(a)] == [(0.25, 2)]
    (comparison,) = results.comparisons([*a, *b])
    assert [(t["seed"], t["only_second"], t["difference"]) for t in comparison["tasks"]] == [(0, 1, 0.5), (1, 2, 1.0)]
    assert "gsm8k (seed 1)" in report.comparison_text([comparison])


def test_the_table_says_what_was_measured_how(answers):
    text = report.table(results.scores(answers), results.means(answers), {"vllm": "0.32.0", "lm_eval": "0.4.13"})
    lines = text.splitlines()
    assert lines[0].startswith("Protocol llm_adapters: the prompts and parsing of the PEFT papers")
    assert lines[0].endswith("(vllm 0.32.0, lm_eval 0.4.13)")
    assert " ".join(lines[2].split()) == "model served as task metric version shots n value % stderr"
    assert lines[5].split() == ["tuned", "merged", "arc_easy", "acc*", "1.0", "0", "4", "75.00", "25.00"]
    assert lines[-1].split() == ["tuned", "2", "tasks", "75.00", "17.68"]


def repeated(metrics, extracted):
    """One sample per row and repeat, of one metric and what was read."""
    return [
        SimpleNamespace(task="gsm8k", seed=0, row=row, repeat=repeat, metrics={"acc": value}, extracted={"acc": said})
        for row, (values, words) in enumerate(zip(metrics, extracted, strict=True))
        for repeat, (value, said) in enumerate(zip(values, words, strict=True))
    ]


def test_repeats_by_hand():
    """Four answers to each of three rows, of which 1, 3 and 0 are right.

    mean: (1/4 + 3/4 + 0) / 3 = 1/3. pass@2: 1 - C(3,2)/C(4,2) = 1/2, 1 - 0 = 1, 0, on average 1/2. pass@4: 2/3.
    maj@4: 7 beats 18 (wrong); 18 wins (right); all differ, the first counts (wrong): 1/3.
    """
    asked = repeated(
        [[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 0]],
        [["18", "7", "7", "[invalid]"], ["18", "$18", "[invalid]", "1,8"], ["1", "2", "3", "4"]],
    )
    (task,) = load_tasks("llm_adapters", ["gsm8k"])
    by_metric = {s.metric: s for s in results.scores(results.gather("a", "base", [task], asked[::-1]))}
    assert {metric: s.value for metric, s in by_metric.items()} == pytest.approx(
        {"acc": 1 / 3, "pass@2": 1 / 2, "pass@4": 2 / 3, "maj@4": 1 / 3}
    )
    assert {(s.n, s.repeats) for s in by_metric.values()} == {(3, 4)}  # the row is the unit, not the answer
    assert by_metric["acc"].stderr == pytest.approx(statistics.stdev([0.25, 0.75, 0]) / math.sqrt(3))
    assert [s.headline for s in by_metric.values()] == [True, False, False, False]


def test_no_answer_wins_only_where_all_are_none():
    (task,) = load_tasks("llm_adapters", ["gsm8k"])
    asked = repeated([[0, 0, 1], [0, 0, 0]], [["[invalid]", "[invalid]", "18"], ["[invalid]", "", "inf"]])
    values = {s.metric: s.value for s in results.scores(results.gather("a", "base", [task], asked))}
    assert (values["maj@3"], values["acc"]) == (0.5, pytest.approx(1 / 6))


def test_votes_on_whole_texts_are_read_as_the_task_reads_them():
    """LLM-Adapters' tasks have no filters: what is kept of an answer is its text."""
    (task,) = load_tasks("llm_adapters", ["boolq"])
    texts = ["it is false", "so true it is", "true, I say", "no idea"]
    asked = [
        SimpleNamespace(
            task="boolq", seed=0, row=0, repeat=i, extracted={"none": text}, metrics={"acc": float(i in (1, 2))}
        )
        for i, text in enumerate(texts)
    ]
    values = {s.metric: s.value for s in results.scores(results.gather("a", "base", [task], asked))}
    assert values == {"acc": 0.5, "pass@2": 1 - 1 / 6, "pass@4": 1.0, "maj@4": 1.0}


def test_a_vote_needs_answers_that_were_kept():
    (task,) = load_tasks("llm_adapters", ["gsm8k"])
    asked = [SimpleNamespace(**{**vars(s), "extracted": {}}) for s in repeated([[1, 0]], [["", ""]])]
    assert {s.metric for s in results.scores(results.gather("a", "base", [task], asked))} == {"acc", "pass@2"}


def test_comparisons_in_words(answers):
    (comparison,) = results.comparisons(answers)
    text = report.comparison_text([comparison])
    assert "+37.50 points, p 0.25 (sign flips), no interval, since the models differ on 3 rows only" in text
    assert [t["p_holm"] for t in comparison["tasks"]] == [1.0, 1.0]


@pytest.mark.parametrize("shown", [lambda s, p: report.table(s, [], {}), report.save_chart])
def test_two_protocols_never_share_a_table_or_a_chart(shown, answers, tmp_path):
    scores = results.scores(answers)
    mixed = [scores[0], dataclasses.replace(scores[1], protocol="lm_eval")]
    with pytest.raises(ValueError, match="figures of llm_adapters and lm_eval are not comparable and never share"):
        shown(mixed, tmp_path / "x.png")


def test_the_chart_is_drawn(answers, tmp_path):
    report.save_chart(results.scores(answers), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_json_has_no_nan_and_is_whole_or_not_there(tmp_path):
    results.write_json(tmp_path / "a" / "x.json", {"stderr": math.nan, "list": [math.nan, 1.0]})
    assert json.loads((tmp_path / "a" / "x.json").read_text()) == {"stderr": None, "list": [None, 1.0]}
    with pytest.raises(TypeError):
        results.write_json(tmp_path / "a" / "y.json", {"bad": object()})
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.json"]
