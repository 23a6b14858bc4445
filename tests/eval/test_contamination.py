"""Rows a model has seen are found through case, spacing, punctuation and the instruction around them."""

import json

import pytest

from eval import reading
from eval.contamination import files_of_plan, question_hash, read_seen, refuse_seen
from eval.errors import EvalError, UsageError
from tests.helpers.jsonl import write_jsonl


LONG = "Ana has 3 apples and buys 4 more. How many apples does she have?"


def seen_in(tmp_path, *rows):
    return read_seen([write_jsonl(tmp_path / "train.jsonl", rows)])


@pytest.mark.parametrize(
    "row",
    [
        {"question": LONG, "answer": "7"},
        {"question": "ANA HAS 3  APPLES, and buys 4 more: how many apples does she have", "answer": "7"},
        {"instruction": f"Solve this.\n\nQuestion: {LONG}\nThink first.", "output": "7"},
        {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "7"}]},
        {"text": f"### Instruction:\n{LONG}\n### Response:\n7"},
    ],
)
def test_a_seen_row_is_refused_with_count_and_example(row, tmp_path):
    with pytest.raises(EvalError) as caught:
        refuse_seen("gsm8k", ["another question of five words", LONG], seen_in(tmp_path, {"text": "x"}, row))
    said = "gsm8k: 1 of 2 rows were in the training or calibration data, first: 'Ana has 3 apples"
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "text",
    [
        LONG.replace("4", "5"),  # one word differs
        "Ana has 3 apples and buys 4 more. How many apples",  # only a part of it
        "apples",
    ],
)
def test_other_rows_pass(text, tmp_path):
    refuse_seen("gsm8k", [LONG], seen_in(tmp_path, {"question": text}))


def test_a_short_question_counts_only_as_a_text_of_its_own(tmp_path):
    seen = seen_in(tmp_path, {"question": "well, is it red then?"})
    assert seen.seen_among(["Is it red?"]) == []
    assert seen_in(tmp_path, {"question": "is it  RED"}).seen_among(["Is it red?"]) == ["Is it red?"]


def test_two_questions_with_one_beginning_are_told_apart(tmp_path):
    start = "one two three four five six seven eight"
    seen = seen_in(tmp_path, {"text": f"so {start} nine"})
    assert seen.seen_among([f"{start} nine", f"{start} ten", start]) == [f"{start} nine", start]


def test_hash_ignores_only_form():
    assert question_hash("Is it  so?") == question_hash("is it so")
    assert question_hash("is it so") != question_hash("is it not so")


def test_json_lists_are_read_too(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"instruction": LONG, "output": "7"}]))
    assert read_seen([path]).seen_among([LONG]) == [LONG]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"train": [{"instruction": LONG}], "version": 1}),
        json.dumps({"question": "x"}) + "\n" + json.dumps({"question": LONG}) + "\n",
    ],
)
def test_json_of_any_shape_is_read(text, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(text)
    assert read_seen([path]).seen_among([LONG]) == [LONG]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PAR1\x15\x04\xff\xfe\n", "train.parquet:1: this is no UTF-8 text; save the rows as JSON lines"),
        (b"[1, 2]", "train.parquet holds no text to compare with"),
        (b"", "train.parquet holds no text to compare with"),
    ],
)
def test_a_file_without_texts_is_refused(content, words, tmp_path):
    path = tmp_path / "train.parquet"
    path.write_bytes(content)
    with pytest.raises(EvalError, match=words):
        read_seen([path])


@pytest.mark.parametrize(
    "question",
    ["\u5c0f\u660e\u6709\u4e09\u4e2a\u82f9\u679c\u53c8\u4e70\u4e86\u56db\u4e2a\u4e00\u5171\u51e0\u4e2a",
     "\u0e01\u0e02\u0e04\u0e07\u0e08\u0e0a\u0e0b\u0e0d\u0e14\u0e15"],
)  # fmt: skip
def test_scripts_without_spaces_are_found_inside_texts(question, tmp_path):
    around = question[:3]
    assert seen_in(tmp_path, {"text": around + question + around}).seen_among([question]) == [question]
    assert seen_in(tmp_path, {"text": around + question[:-1]}).seen_among([question]) == []


def plan(tmp_path, names):
    path = tmp_path / "adaptive_rank_plan.json"
    path.write_text(json.dumps({"provenance": {"calibration_dataset": names}}))
    return path


def test_a_plan_leads_to_its_files(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.jsonl"}}))
    with pytest.raises(UsageError, match=r"--plan: .*mine.jsonl, the file of its data set 'mine', does not exist"):
        files_of_plan(plan(tmp_path, ["mine"]), tmp_path)
    (tmp_path / "mine.jsonl").mkdir()
    with pytest.raises(UsageError, match="is a folder; give --train-file instead"):
        files_of_plan(plan(tmp_path, ["mine"]), tmp_path)
    (tmp_path / "mine.jsonl").rmdir()
    (tmp_path / "mine.jsonl").touch()
    assert files_of_plan(plan(tmp_path, ["mine"]), tmp_path) == [tmp_path / "mine.jsonl"]


@pytest.mark.parametrize(
    ("names", "folder", "words"),
    [
        (["mine"], False, "names mine; give the run's dataset_dir as --dataset-dir"),
        (["hub"], True, "its data set 'hub' is no file of"),
        ("mine", True, "is no rank plan that names its calibration data"),
        ([1], True, "is no rank plan that names its calibration data"),
        ([["mine"]], True, "is no rank plan that names its calibration data"),
        (["gone"], True, "its data set 'gone' is no file of"),
    ],
)
def test_a_plan_that_leads_nowhere_says_what_to_give(names, folder, words, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"hub": {"hf_hub_url": "x/y"}}))
    with pytest.raises(UsageError, match=words):
        files_of_plan(plan(tmp_path, names), tmp_path if folder else None)


def test_a_plan_that_is_none(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError, match="is no rank plan that names its calibration data"):
        files_of_plan(tmp_path / "x.json", tmp_path)


@pytest.mark.parametrize("file_name", ["x" * 5000, 5, None, "a\0b"])
def test_a_table_of_others_with_names_that_are_none(file_name, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": file_name}}))
    with pytest.raises(UsageError, match="--train-file"):
        files_of_plan(plan(tmp_path, ["mine"]), tmp_path)


@pytest.mark.parametrize("size", [10, 2**21])
def test_plans_and_tables_of_others_are_read_with_limits(size, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MAX_RESULTS", 2**20)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": "x" * size, "mine": 5}))
    with pytest.raises(UsageError, match="larger than 1 MiB" if size > 2**20 else "'mine' is no file of"):
        files_of_plan(plan(tmp_path, ["mine"]), tmp_path)
    path = plan(tmp_path, ["x" * size])
    with pytest.raises(UsageError, match="larger than 1 MiB" if size > 2**20 else "give the run's dataset_dir"):
        files_of_plan(path, None)
