"""Answers out of text: the published patterns, their blind spots, and what the third extraction sees."""

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from eval import extraction
from eval.protocols import PROTOCOLS, load_tasks, task_config, task_names
from eval.tasks import parsing, rows
from tests.helpers.processes import ROOT


PYTHON = Path(os.environ.get("LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON") or ROOT / ".venv-eval" / "bin" / "python")


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
        ("#### 18 and " + "9" * 1001, "18", "[invalid]", "18"),
        ("18 eggs", "[invalid]", "18", "[invalid]"),
        ("no idea", "[invalid]", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]", "[invalid]"),
    ],
)
def test_three_extractions(text, strict, flexible, training):
    extracted = extraction.strict(text), extraction.flexible(text), extraction.training_format(text)
    assert extracted == (strict, flexible, training)


def test_the_task_file_uses_the_same_patterns():
    text = (ROOT / "eval" / "tasks" / "lm_eval" / "gsm8k.yaml").read_text()
    filters = yaml.safe_load(re.sub("!function ", "", text))["filter_list"]
    patterns = {f["name"]: f["filter"][0].get("regex_pattern") for f in filters}
    assert patterns == {"strict-match": extraction.STRICT, "flexible-extract": extraction.FLEXIBLE,
                        "training-format": None}  # fmt: skip


def test_training_filter_keeps_the_shape():
    assert extraction.training_filter([["#### 4"], ["x", "#### 5"]], [{}, {}]) == [["4"], ["[invalid]", "5"]]


def test_training_filter_spells_a_right_value_as_the_label_does():
    """lm-evaluation-harness compares texts; the training format compares numbers."""
    label = [{"answer": "so\n#### $1,234.50"}]
    assert extraction.training_filter([["#### 1234.5", "the answer is 1234"]], label) == [["1234.50", "1234"]]
    assert extraction.matches("1234.50", label[0]["answer"])


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("18", "so\n#### 18", True), ("18.", "#### 18", True), ("$1,8", "#### 18", True), ("18.00", "#### 18", False),
        (".75", "#### 0.75", False), ("18", "18", True), ("1", "#### 2 #### 1", True), ("[invalid]", "#### 1", False),
    ],
)  # fmt: skip
def test_compared_as_text(answer, target, same):
    assert extraction.matches(answer, target) == same


LM_EVAL = """
import json, sys
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
import yaml
from pathlib import Path
import lm_eval
config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
(metric,) = config["metric_list"]
settings = {key: metric[key] for key in ("regexes_to_ignore", "ignore_case", "ignore_punctuation")}
filters = {}
for named in config["filter_list"]:
    words = {key: value for key, value in named["filter"][0].items() if key != "function"}
    filters[named["name"]] = RegexFilter(**words)
for line in sys.stdin:
    text, target = json.loads(line)
    verdicts = {}
    for name, made in filters.items():
        answer = made.apply([[text]], [{}])[0][0]
        same = exact_match_hf_evaluate(predictions=[answer], references=[target], **settings)["exact_match"]
        verdicts[name] = [answer, bool(same)]
    print(json.dumps(verdicts))
"""


@pytest.mark.eval_env
@pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-eval: make eval-install")
def test_strict_and_flexible_are_those_of_lm_evaluation_harness():
    """Its own pattern filter, its own comparison, its own task file, on 2,000 texts of the pieces that matter."""
    rng = random.Random(7)
    numbers = ["18", "18.00", ".75", "0.75", "1,8", "$18", "-18", "####18", "00"]
    pieces = [*numbers, "#### ", ".", ",", "$", "-", "\n", " ", "eggs"]
    labels = ["so\n#### 18", "#### 0.75", "#### -18", "#### 1,800", "18", "#### 18.", "#### 18.00"]
    texts = ["#### " * rng.randint(0, 1) + "".join(rng.choices(pieces, k=rng.randint(0, 4))) for _ in range(2000)]
    cases = [(text, rng.choice(labels)) for text in texts]
    said = subprocess.run([PYTHON, "-c", LM_EVAL], input="".join(json.dumps(c) + "\n" for c in cases), text=True,
                          capture_output=True, check=True).stdout.splitlines()  # fmt: skip
    for (text, target), line in zip(cases, said, strict=True):
        strict, flexible = extraction.strict(text), extraction.flexible(text)
        assert json.loads(line) == {
            "strict-match": [strict, extraction.matches(strict, target)],
            "flexible-extract": [flexible, extraction.matches(flexible, target)],
        }, (text, target)
    assert sum(json.loads(line)["strict-match"][1] for line in said) > 20  # some are right


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("#### 18", "#### 18"),
        ("<think>#### 5</think>\n#### 18", "#### 18"), ("#### 5\n</think>\n#### 18", "#### 18"),
        ("<think>#### 5", ""), ("#### 18 <think>no</think>", "#### 18"), ("<think>a<think>b</think>c</think>18", "18"),
        ("<think>a<think>b</think>c", ""), ("<THINK>a</Think> <thinking>b</thinking> 18", "18"),
        ("a < think > b", "a < think > b"),
        ("<think>a</think>18<think>b", ""), ("<think></think>", ""), ("", ""),
    ],
)  # fmt: skip
def test_thinking_is_stripped(text, left):
    assert extraction.without_thinking(text) == left


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_thinking_is_stripped_before_every_extraction(protocol):
    for task in load_tasks(protocol, task_names(protocol)):
        plain, stripped = (task_config(task, "none", None, asked).get("filter_list") for asked in (False, True))
        assert plain == task.config.get("filter_list")
        if task.likelihood:
            assert stripped == plain
            continue
        assert [f["name"] for f in stripped] == [f["name"] for f in plain or [{"name": "none"}]]
        for named in stripped:
            assert named["filter"][0] == {"function": "custom", "filter_fn": extraction.thinking_filter}
            assert named["filter"][-1] == {"function": "take_first"}


def test_votes_read_what_is_scored():
    """What a task's reader finds for its headline metric is right exactly when the metric says so."""
    for task in load_tasks("llm_adapters", task_names("llm_adapters")):
        assert task.headline in task.reads("18 answer2 solution1 A true")
    assert parsing.read_gsm8k("#### 1,234, not 7.") == {
        "acc": "7.0",
        "strict": "1,234,",
        "flexible": "7.",
        "training": "1234",
    }


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
