"""Answers out of text: the published patterns, their blind spots, and what the third extraction sees."""

import re

import pytest
import yaml
from processes import ROOT

from eval import extraction
from eval.tasks import parsing, rows


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "training"),
    [
        ("9 * 2 = 18\n#### 18", "18", "18", "18"),
        ("#### 1,234.00", "1,234.00", "1,234.00", "1234"),
        ("#### 5\n\nQuestion: how many are 7?", "5", "7", "5"),  # rambling on spoils flexible alone
        ("#### 5\nno, wait\n#### 6", "5", "6", "6"),
        ("The answer is 18.", "[invalid]", "18.", "18"),
        ("So the answer is: $1,200", "[invalid]", "$1,200", "1200"),
        (r"hence \boxed{-3}", "[invalid]", "-3", "-3"),
        (r"so \boxed{\$18}", "[invalid]", "$18", "18"),
        (r"so \boxed{\text{18}}", "[invalid]", "18", "18"),
        ("The answer is 3/4", "[invalid]", "4", "0.75"),
        ("The answer is 3/0", "[invalid]", "0", "[invalid]"),
        ("18 eggs", "[invalid]", "18", "[invalid]"),
        ("no idea", "[invalid]", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]", "[invalid]"),
    ],
)
def test_three_extractions(text, strict, flexible, training):
    found = extraction.strict(text), extraction.flexible(text), extraction.training_format(text)
    assert found == (strict, flexible, training)


def test_the_task_file_uses_the_same_patterns():
    text = (ROOT / "eval" / "tasks" / "lm_eval" / "gsm8k.yaml").read_text()
    filters = yaml.safe_load(re.sub("!function ", "", text))["filter_list"]
    patterns = {f["name"]: f["filter"][0].get("regex_pattern") for f in filters}
    assert patterns == {"strict-match": extraction.STRICT, "flexible-extract": extraction.FLEXIBLE,
                        "training-format": None}  # fmt: skip


def test_training_filter_keeps_the_shape():
    assert extraction.training_filter([["#### 4"], ["x", "#### 5"]], [{}, {}]) == [["4"], ["[invalid]", "5"]]


@pytest.mark.parametrize(
    ("number", "spelled"),
    [("1,000", "1000"), ("$3.50", "3.5"), ("18.", "18"), ("-2.0", "-2"), ("1.2.3", "1.2.3"), ("9" * 400, "9" * 400)],
)
def test_canonical(number, spelled):
    assert extraction.canonical(number) == spelled


def test_gsm8k_of_the_papers_takes_the_last_number_within_a_thousandth():
    row = {"answer": "so\n#### 1,234"}
    assert parsing.gsm8k(row, ["makes 1,234.0005 in all"]) == {"acc": 1, "strict": 0, "flexible": 0, "training": 0}
    assert parsing.gsm8k(row, ["#### 1234"]) == {"acc": 1, "strict": 1, "flexible": 1, "training": 1}
    assert parsing.gsm8k(row, ["#### 1234, not 7"]) == {"acc": 0, "strict": 1, "flexible": 0, "training": 1}
    assert sum(parsing.gsm8k(row, ["no number"]).values()) == 0


def test_the_first_word_that_can_be_an_answer_counts():
    arc = {"choices": {"label": ["1", "2", "3"], "text": ["a", "b", "c"]}, "answerKey": "3"}
    assert parsing.arc(arc, ["the correct answer is answer3"]) == {"acc": 1}
    assert parsing.arc(arc, ["answer1, or answer3"]) == {"acc": 0}
    assert parsing.arc(arc, ["Answer3"]) == {"acc": 0}  # as published: lower case only
    assert parsing.boolq({"label": 0}, ["false. true?"]) == {"acc": 1}
    assert parsing.boolq({"label": 1}, [""]) == {"acc": 0}
    assert parsing.copa({"label": 1}, ["solution2"]) == {"acc": 1}
    assert parsing.aqua({"correct": "C"}, ["it is 252, so (C)"]) == {"acc": 1}
    assert parsing.aqua({"correct": "C"}, ["A train: (C)"]) == {"acc": 0}  # as published: any capital letter


def test_rows_come_to_one_shape():
    assert rows.boolq_row({"question": "is it?", "answer": True})["label"] == 1
    assert rows.boolq_row({"question": "is it", "label": 0}) == {"question": "is it", "label": 0}
    row = rows.aqua_row({"question": "q", "options": ["A)1", "B)2"], "correct": "B"})
    assert (row["choices"], row["gold"]) == (["(A)1", "(B)2"], 1)
    copa = {"premise": "It rained. ", "choice1": "He left.", "choice2": "She came.", "question": "effect", "label": 1}
    assert rows.copa_text(copa) + rows.copa_target(copa) == "It rained therefore she came."
