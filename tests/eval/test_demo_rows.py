"""The rows that `make eval-demo` generates: right answers, nothing the demo trained on, fit for both protocols."""

import json
import re
import sys

import pytest

from eval.data import check_files, local_files
from eval.protocols import PROTOCOLS, load_tasks
from tests.helpers.processes import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    import eval_rows

    made = tmp_path_factory.mktemp("rows")
    eval_rows.write(made, rows=64, seed=11)
    return made


def read(folder, task, split="dev"):
    return [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_task_finds_its_fields(protocol, folder):
    for task in load_tasks(protocol, ["gsm8k", "boolq", "arc_easy", "arc_challenge"]):
        check_files(task, local_files(task, folder, "dev"))


def test_rows_are_new_and_seeded(folder, tmp_path):
    import eval_rows
    import word_problems

    trained = {row["instruction"] for row in word_problems.generate(368, seed=7)}
    for task in eval_rows.KINDS:
        dev, train = ([row["question"] for row in read(folder, task, split)] for split in ("dev", "train"))
        assert len(set(dev)) == 64
        assert not set(dev) & (set(train) | trained)
    eval_rows.write(tmp_path, rows=64, seed=11)
    assert all(read(folder, task) == read(tmp_path, task) for task in eval_rows.KINDS)


def test_answers_are_right(folder):
    for row in read(folder, "boolq"):
        one, two = map(int, re.findall(r"has (\d+)", row["passage"]))
        assert row["answer"] == (one > two)
    for row in read(folder, "arc_easy"):
        answer = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert int(answer) == max(map(int, row["choices"]["text"]))
        assert answer in row["question"]
    for row in read(folder, "gsm8k") + read(folder, "arc_challenge"):
        numbers = list(map(int, re.findall(r"\d+", row["question"])))
        kind = re.search(r"change|each friend|are left", row["question"]).group()
        a, b, c = numbers
        expected = {"change": c - a * b, "each friend": (a - b) / c, "are left": a + a * b - c}[kind]
        if "answer" in row:
            assert expected == int(row["answer"].rsplit("#### ", 1)[1])
        else:
            assert expected == int(row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])])
