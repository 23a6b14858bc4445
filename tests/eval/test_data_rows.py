"""Local rows: what stands in the file is what is scored, and JSON that nobody would write is one message."""

import json
import os

import pytest

from eval import contamination, reading
from eval.data import check_files, read_splits
from eval.errors import EvalError
from eval.protocols import load_tasks
from eval.tasks import parsing, values
from tests.helpers.jsonl import write_jsonl


def test_brackets_in_a_folder_are_no_pattern(tmp_path):
    for name, answer in (("set[1]", "#### 111"), ("set1", "#### 999")):
        write_jsonl(tmp_path / name / "dev.jsonl", [{"answer": answer}])
    assert read_splits({"test": tmp_path / "set[1]" / "dev.jsonl"}) == {"test": [{"answer": "#### 111"}]}


def test_a_question_that_looks_like_a_date_stays_text(tmp_path):
    path = write_jsonl(tmp_path / "dev.jsonl", [{"question": "2020-01-01"}, {"question": "2020-01-01T00:00:00"}])
    assert [row["question"] for row in read_splits({"test": path})["test"]] == ["2020-01-01", "2020-01-01T00:00:00"]


def test_rows_have_the_keys_of_all(tmp_path):
    path = write_jsonl(tmp_path / "dev.jsonl", [{"question": "a", "answer": True}, {"question": "b", "label": 0}])
    assert read_splits({"test": path})["test"] == [
        {"question": "a", "answer": True, "label": None}, {"question": "b", "answer": None, "label": 0}]  # fmt: skip


DEEP = "[" * 100_000 + "]" * 100_000
TOO_DEEP = "[" * 200 + "]" * 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "this is not JSON"), (b"\xff\xfe", "this is not JSON"), (b"[]", "a JSON object, this is list"),
        (b"null", "this is NoneType"), (b'{"a":' + DEEP.encode() + b"}", "nested more than 100 levels deep"),
        (TOO_DEEP.encode(), "nested more than 100 levels deep"), (b'{"a": ' + b"9" * 5000 + b"}", "this is not JSON"),
    ],
)  # fmt: skip
def test_documents_of_others(content, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(EvalError, match=message):
        reading.read_object(path)


def test_files_that_are_too_large_or_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RESULTS", 2**20)
    monkeypatch.setattr(reading, "MAX_LINE", 2**20)
    path = tmp_path / "x.json"
    with pytest.raises(EvalError, match=r"cannot be read \(No such file or directory\)"):
        reading.read_object(path)
    path.write_text(json.dumps({"a": "x" * 2**20}))
    with pytest.raises(EvalError, match="larger than 1 MiB"):
        reading.read_object(path)
    with pytest.raises(EvalError, match=":1: this line is longer than 1 MiB"):
        list(reading.numbered_rows(path))
    with pytest.raises(EvalError, match="cannot be read"):
        list(reading.numbered_rows(tmp_path))


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    pipe = tmp_path / "x.json"
    os.mkfifo(pipe)
    for read in (reading.read_object, lambda path: list(reading.numbered_rows(path))):
        with pytest.raises(EvalError, match=r"x\.json: cannot be read \(it is no regular file\)"):
            read(pipe)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: this line is not JSON"),
        ("[1]", ":2: a row must be a JSON object"),
        (DEEP, ":2: this JSON is nested"),
    ],
)
def test_rows_of_others(line, message, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n" + line + "\n")
    with pytest.raises(EvalError, match=message):
        list(reading.numbered_rows(path))


def test_a_deep_training_file_is_one_message(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(DEEP)
    with pytest.raises(EvalError, match="nested more than 100 levels"):
        contamination.read_seen([path])


def test_training_rows_too_long_for_one_document_are_read_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 2**20)
    path = tmp_path / "train.json"
    path.write_text('{"text": "a"}\n{"text": "b"}\n' + "\n" * 2**20)
    assert contamination.read_seen([path]).seen_among(["a", "b", "c"]) == ["a", "b"]
    path.write_text('[\n"a",\n"b"\n]' + "\n" * 2**20)
    with pytest.raises(EvalError, match=r"train\.json:1: .*; a file above 1 MiB must be JSON lines"):
        contamination.read_seen([path])


@pytest.mark.parametrize("value", ["1", True, None, float("nan"), float("inf"), [1]])
def test_numbers_are_numbers(value):
    with pytest.raises(EvalError, match=r"'n' is .*, it must be int or float"):
        reading.field({"n": value}, "n", (int, float), "x")
    assert reading.field({"n": 1.5}, "n", (int, float), "x") == 1.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"question": "a\ud800b"}, ":2: 'question' holds half of a surrogate pair"),
        ({"id": [{"a": "\udcff"}]}, ":2: 'id' holds half of a surrogate pair"),
        ({"\udcff": 1}, r":2: '\\udcff' holds half of a surrogate pair"),
        ({"id": 10**30}, ":2: 'id' holds a whole number beyond 64 bits"),
        ({"id": {"a": [-(2**63) - 1]}}, ":2: 'id' holds a whole number beyond 64 bits"),
    ],
)
def test_what_no_table_of_rows_can_hold_is_told_with_its_line(more, message, tmp_path):
    (task,) = load_tasks("llm_adapters", ["gsm8k"])
    row = {"question": "What?", "answer": "#### 1", "id": 2**64 - 1}
    path = write_jsonl(tmp_path / "dev.jsonl", [row, row | more])
    with pytest.raises(EvalError, match=message):
        check_files(task, {"test": path})
    check_files(task, {"test": write_jsonl(path, [row])})


HUGE = "x" * 10**6


@pytest.mark.parametrize(
    ("check", "row"),
    [
        (values.boolq, {"question": "q", "answer": HUGE}),
        (values.boolq, {"question": [HUGE], "answer": True}),
        (values.arc, {"question": "q", "choices": {"text": ["a"], "label": [HUGE]}, "answerKey": HUGE + "y"}),
        (values.aqua, {"question": "q", "options": ["A)1"], "correct": HUGE}),
        (values.copa, {"premise": "p", "choice1": "a", "choice2": "b", "question": HUGE, "label": 0}),
        (values.copa, {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": HUGE}),
    ],
)
def test_a_huge_value_is_not_repeated_whole(check, row):
    assert len(check(row)) < 400


@pytest.mark.parametrize("label", [1, True, 1.0])
def test_every_spelling_of_a_label_that_passes_can_be_right(label):
    row = {"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "label": label}
    assert values.copa(row) is None
    assert parsing.copa(row, ["the correct answer is solution2"]) == {"acc": 1.0}
