"""From answers to ``compare.json``'s part on tasks, tables and sentences."""

import json
import re

import numpy as np
import pytest

from eval.stats import sign_flip_p
from llamafactory_adaptive.comparison.pages import html_page, markdown_page, markdown_sentence
from llamafactory_adaptive.comparison.task_pages import (
    task_markdown,
    task_page,
    task_sentences,
    task_tables,
    task_text,
)
from llamafactory_adaptive.comparison.task_request import points
from llamafactory_adaptive.comparison.task_results import digits_of, task_document, what_would_decide
from llamafactory_adaptive.comparison.task_scores import Accuracy, Answers, TaskJudgement


FACTS = {"protocol": "lm_eval", "limit": 200, "form": "adapter", "questions": {"boolq": 200, "copa": 100},
         "commonest_answer": {"boolq": 0.6, "copa": 0.5},
         "metrics": {"boolq": "acc", "copa": "acc"}, "notes": ["igu: a request failed, mended"]}  # fmt: skip


def values(share, questions, seeds=3):
    """Right answers to the first share of the questions; in each seed another one of the others is right, too."""
    made = np.zeros((seeds, questions))
    made[:, : int(share * questions)] = 1.0
    for row in range(seeds):
        made[row, -1 - row] = 1.0
    return made


def arm(boolq, copa, seeds=3):
    return Answers(tuple(range(1, 1 + seeds)), {"boolq": values(boolq, 200, seeds), "copa": values(copa, 100, seeds)})


@pytest.fixture(scope="module")
def made():
    answers = {"lora": arm(0.5, 0.5), "random": arm(0.5, 0.5), "<b>igu</b>": arm(0.8, 0.5), "once": arm(0.5, 0.5, 1)}
    failed = {"dora": "the fake server does not take it", "once": "its adapter of seed 2 is no longer there"}
    return {"tasks": task_document(answers, failed, 0.02, sign_flip_p, FACTS)}


def entry(made, name):
    return next(each for each in made["tasks"]["arms"] if each["name"] == name)


def test_the_document_holds_accuracies_and_verdicts_against_both_rivals(made):
    igu = entry(made, "<b>igu</b>")
    assert igu["accuracy"]["boolq"]["value"] == pytest.approx(0.805)
    assert igu["accuracy"]["mean"]["value"] == pytest.approx((0.805 + 0.51) / 2)
    verdicts = {(task, rival): each["verdict"] for task, by in igu["verdicts"].items() for rival, each in by.items()}
    assert verdicts[("boolq", "lora")] == verdicts[("boolq", "random")] == "better"
    against = igu["verdicts"]["boolq"]["lora"]
    assert against["difference"]["low"] < 0.3 == pytest.approx(against["difference"]["value"])
    assert against["difference"]["low"] < against["difference"]["low_90"] < against["difference"]["high_90"]
    assert against["questions_that_differ"] == 60
    assert against["tests"] == 4, "random and igu, in two tasks: one seed is no test"
    assert 0.0 < against["detectable_by_questions"] <= against["detectable"]
    assert "verdicts" not in entry(made, "dora")
    assert json.loads(json.dumps(made)) == made


def test_sentences_tell_verdicts_power_and_what_is_missing(made):
    said = task_sentences(made)
    assert any(
        re.fullmatch(r"<b>igu</b> in boolq: better than lora: \+30\.0 points \(95 % interval .*\)", s) for s in said
    )
    assert any(re.match(r"random in copa: equivalent to lora: \+0\.0 points \(90 % interval \S+ to \S+\), within the "
                        r"2 points that were to matter", s) for s in said)  # fmt: skip
    assert any(
        re.match(r"once in boolq: not decided against lora: .* over questions alone .* give at least 3", s)
        for s in said
    )
    assert "once: answered with 1 seeds alone: its adapter of seed 2 is no longer there" in said
    assert said[-1] == FACTS["notes"][0]


def test_what_is_not_decided_tells_the_power(made):
    near = {"lora": arm(0.5, 0.5), "igu": arm(0.53, 0.5)}
    said = task_sentences({"tasks": task_document(near, {}, 0.01, sign_flip_p, FACTS)})
    power = (
        r"; 200 questions and 3 seeds show \d\.\d points four times in five \(\d\.\d points were seeds all alike\): "
    )
    assert said[0].startswith("igu in boolq: not decided against lora: +3.0 points ")
    assert re.search(power + "more questions are needed", said[0])


@pytest.mark.parametrize(
    ("over_seeds", "over_questions", "lacking"),
    [
        (0.02, 0.001, "seeds"),
        (0.001, 0.02, "questions"),
        (0.0025, 0.0025, "seeds"),
        (0.02, 0.02, "questions and seeds"),
    ],
)
def test_what_is_lacking_is_what_would_suffice_alone(over_seeds, over_questions, lacking):
    """With equal errors it is the seeds: Student's t with two degrees of freedom asks more of them."""
    found = Accuracy(0.002, over_seeds, over_questions, 3, 400)
    judgement = TaskJudgement("igu", "lora", "boolq", "not decided", 0.01, found, 30, 0.5, 0.5)
    assert what_would_decide(judgement).endswith(f": more {lacking} are needed")


def test_no_interval_and_no_power_goes_beyond_all_questions():
    found = Accuracy(-0.2, 0.2, 0.01, 3, 400)
    judgement = TaskJudgement("igu", "lora", "boolq", "not decided", 0.01, found, 30, 0.5, 0.5)
    assert judgement.interval() == (-1.0, pytest.approx(-0.2 + found.reach(0.025)))
    assert what_would_decide(judgement).startswith("400 questions and 3 seeds could not show even 100 points (")


def test_there_is_a_table_for_each_task_and_for_their_mean(made):
    tables = task_tables(made)
    assert list(tables) == ["boolq, 200 questions, acc", "copa, 100 questions, acc", "Mean over 2 tasks"]
    rows = {row[0]: row for row in tables["boolq, 200 questions, acc"]}
    assert re.fullmatch(r"80\.5 % ± \d\.\d", rows["<b>igu</b>"][1])
    assert rows["<b>igu</b>"][4] == "better"
    assert rows["lora"][2:] == ("",) * 5
    assert rows["dora"][1] == "could not be evaluated: the fake server does not take it"
    assert [table[-1][:2] for table in tables.values()] == [
        ("always the commonest answer", share) for share in ("60.0 %", "50.0 %", "55.0 %")
    ]
    assert "  ".join(task_text(made)[2].split()).startswith("arm  accuracy  against")


def test_where_choices_are_many_no_answer_is_the_commonest(made):
    free = {**made["tasks"], "commonest_answer": {"boolq": 0.6, "copa": None}}
    tables = task_tables({"tasks": free})
    assert [table[-1][0] == "always the commonest answer" for table in tables.values()] == [True, False, False]


def test_pages_hold_the_tables_and_escape_names(made):
    assert "&lt;b&gt;igu" in task_page(made)
    assert "<b>igu" not in task_page(made)
    lines = "\n".join(task_markdown(made, markdown_sentence))
    assert "### boolq&#44; 200 questions&#44; acc" in lines
    assert "<b>" not in lines
    nothing = {"arms": [{"name": "lora"}], "held_out_rows": {"dev": 1, "test": 1}, "design": {"seeds": 1},
               "smallest_effect": 0.005}  # fmt: skip
    broken = {**nothing, "arms": [{"name": "lora", "failed": "x"}]}
    assert "<h2>Tasks</h2>" in html_page({**broken, **made}, {})
    assert "## Tasks" in markdown_page({**broken, **made})
    assert "Tasks" not in html_page(broken, {}) + markdown_page(broken)
    assert task_text(broken) == []


@pytest.mark.parametrize(
    ("effect", "digits", "said"),
    [(0.01, 1, "1 point"), (0.005, 2, "0.5 points"), (0.1, 1, "10 points"), (0.0005, 3, "0.05 points")],
)
def test_points_have_the_decimals_that_tell_a_tenth_of_the_effect(effect, digits, said):
    assert (digits_of(effect), points(effect)) == (digits, said)
