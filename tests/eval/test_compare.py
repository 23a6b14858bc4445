"""Finished runs compared from their folders: the figures of one run, what is refused, and files that nobody wrote."""

import copy
import json
import math

import pytest

from eval import compare, results, rows
from eval.errors import EvalError
from tests.helpers.jsonl import write_jsonl


ROWS = {"gsm8k": "acc", "boolq": "acc"}
VALUES = {
    "base": {"gsm8k": [0, 0, 1, 0, 1], "boolq": [1, 0, 0]},
    "mine": {"gsm8k": [1, 0, 1, 1, 1], "boolq": [1, 1, 0]},
    "other": {"gsm8k": [0, 1, 1, 1, 0], "boolq": [0, 1, 1]},
}


def sample(model, task, row, value, **more):
    return {"model": model, "task": task, "seed": 1, "row": row, "question": "q", "prompt": "p", "target": "t",
            "response": "r", "metrics": {"acc": value}, "repeat": 0, "extracted": {"none": "r"}} | more  # fmt: skip


def score(model, task, values, **more):
    mean = sum(values) / len(values)
    return {"model": model, "form": "merged", "protocol": "llm_adapters", "task": task, "task_version": "1.0",
            "metric": "acc", "headline": True, "value": mean, "stderr": 0.1, "n": len(values), "n_cut": 0,
            "fewshot": 0, "repeats": 1} | more  # fmt: skip


def document(models):
    return {
        "schema_version": results.SCHEMA_VERSION,
        "protocol": "llm_adapters",
        "template": "none",
        "decoding": {"num_beams": 1, "temperature": 0.0},
        "seeds": [1],
        "limit": None,
        "data": {"source": "local", "sets": {task: {"scored_sha256": task * 8} for task in ROWS}},
        "models": [{"name": model, "kind": "merged", "path": "/x"} for model in models],
        "scores": [score(model, task, VALUES[model][task]) for model in models for task in ROWS],
        "means": [],
        "comparisons": [],
        "date": "today",
        "versions": {"vllm": "0.32.0"},
    }


def write(folder, models, change=lambda doc: None, samples=None):
    doc = copy.deepcopy(document(models))
    change(doc)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / results.RESULTS_FILE).write_text(json.dumps(doc))
    if samples is None:
        samples = [sample(m, t, row, float(v)) for m in models for t in ROWS for row, v in enumerate(VALUES[m][t])]
    write_jsonl(folder / results.SAMPLES_FILE, samples)
    return folder


@pytest.fixture
def first(tmp_path):
    return write(tmp_path / "first", ["base", "mine"])


def test_the_figures_are_those_of_a_run(first, tmp_path, capsys):
    """Two folders of one model each say what one folder of both says."""
    second = write(tmp_path / "second", ["other"])
    assert compare.main([str(first), str(second), "--out", str(tmp_path / "both.json")]) == 0
    written = json.loads((tmp_path / "both.json").read_text())
    assert [(c["first"], c["second"]) for c in written["comparisons"]] == [
        ("first:base", "second:other"), ("first:mine", "second:other")]  # fmt: skip
    base = written["comparisons"][0]
    assert base["mean_difference"]["value"] == pytest.approx(((3 - 2) / 5 + (2 - 1) / 3) / 2)
    assert [(t["task"], t["only_first"], t["only_second"], t["p_value"]) for t in base["tasks"]] == [
        ("gsm8k", 1, 2, 1.0), ("boolq", 1, 2, 1.0)]  # fmt: skip
    assert [m["value"] for m in written["means"]] == pytest.approx(
        [(2 / 5 + 1 / 3) / 2, (4 / 5 + 2 / 3) / 2, (3 / 5 + 2 / 3) / 2]
    )
    out = capsys.readouterr().out
    assert "second:other - first:base" in out
    assert out.count("Protocol llm_adapters") == 1


def test_order_of_lines_does_not_matter_and_rows_are_paired(first, tmp_path):
    lines = [json.loads(line) for line in (first / results.SAMPLES_FILE).read_text().splitlines()]
    shuffled = write(tmp_path / "again", ["base", "mine"], samples=lines[::-1])
    pairs = compare.compared(compare.read_runs([first, shuffled]))["comparisons"]
    same = next(p for p in pairs if (p["first"], p["second"]) == ("first:mine", "again:mine"))
    assert (same["mean_difference"]["n_differ"], same["mean_difference"]["p_value"]) == (0, 1.0)


def test_several_folders_and_equal_names(first, tmp_path, capsys):
    others = [write(tmp_path / name / "first", ["other"]) for name in "ab"]
    assert len(compare.compared(compare.read_runs([first, *others]))["comparisons"]) == 2 + 2 + 1
    assert compare.main([str(first), str(others[0])]) == 0
    assert f"{others[0]}:other - {first}:base" in capsys.readouterr().out


def test_what_may_differ_is_noted(first, tmp_path, capsys):
    second = write(tmp_path / "second", ["other"], lambda doc: doc.update(versions={"vllm": "0.33.0"}, date="later"))
    assert compare.main([str(first), str(second)]) == 0
    assert "NOTE: vllm differs: 0.32.0 in first, 0.33.0 in second" in capsys.readouterr().out


def changed(*path, value):
    def change(doc):
        for key in path[:-1]:
            doc = doc[key]
        doc[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("template", value="training"), "template differs, 'none' and 'training'"),
        (changed("decoding", "num_beams", value=4), "decoding differs"),
        (changed("decoding", "strip_thinking", value=True), "decoding differs"),
        (changed("seeds", value=[2]), "seeds differs, [1] and [2]"),
        (changed("limit", value=5), "limit differs, None and 5"),
        (changed("some_new_setting", value=1), "some_new_setting differs, None and 1"),
        (
            changed("data", "sets", "boolq", "scored_sha256", value="x"),
            "boolq has another set of rows (scored_sha256)",
        ),
        (changed("scores", 0, "task_version", value="2.0"), "gsm8k has another version, '1.0' and '2.0'"),
        (changed("scores", 0, "repeats", value=4), "gsm8k has another number of answers to a row, 1 and 4"),
        (changed("scores", 0, "fewshot", value=5), "gsm8k has another number of examples, 0 and 5"),
    ],
)
def test_what_cannot_be_compared(change, message, first, tmp_path, capsys):
    second = write(tmp_path / "second", ["other"], change)
    assert compare.main([str(first), str(second)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_other_protocols_and_tasks(first, tmp_path, capsys):
    def other_protocol(doc):
        doc["protocol"] = "lm_eval"
        for entry in doc["scores"]:
            entry["protocol"] = "lm_eval"

    write(tmp_path / "protocol", ["other"], other_protocol)
    assert compare.main([str(first), str(tmp_path / "protocol")]) == 2
    assert "protocol differs, 'llm_adapters' and 'lm_eval'" in capsys.readouterr().err
    one = [sample("other", "boolq", row, float(v)) for row, v in enumerate(VALUES["other"]["boolq"])]
    write(tmp_path / "task", ["other"], lambda doc: doc["scores"].pop(0), samples=one)
    assert compare.main([str(first), str(tmp_path / "task")]) == 2
    assert "other tasks were asked, gsm8k, boolq and boolq" in capsys.readouterr().err


def test_two_different_folders_and_a_free_name(first, tmp_path, capsys):
    assert compare.main([str(first)]) == 2
    assert compare.main([str(first), str(first)]) == 2
    assert "two or more different folders are compared" in capsys.readouterr().err
    second = write(tmp_path / "second", ["other"])
    assert compare.main([str(first), str(second), "--out", str(first / results.RESULTS_FILE)]) == 2
    assert "exists already, nothing was overwritten" in capsys.readouterr().err


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "1", DEEP, '{"schema_version":3,"protocol":"llm_adapters","scores":' + DEEP + "}", "\x00",
     '{"schema_version":2}', '{"schema_version":3}', '{"schema_version":3,"protocol":"llm_adapters"}',
     '{"schema_version":3,"protocol":["llm_adapters"],"scores":[]}',
     '{"schema_version":3,"protocol":"llm_adapters","scores":[]}',
     '{"schema_version":3,"protocol":"llm_adapters","scores":[1]}',
     '{"schema_version":3,"protocol":"llm_adapters","scores":{"a":1}}'],
    ids=range(15),
)  # fmt: skip
def test_results_that_are_none(content, first, tmp_path, capsys):
    second = write(tmp_path / "second", ["other"])
    (second / results.RESULTS_FILE).write_text(content)
    assert compare.main([str(first), str(second)]) == 2
    assert capsys.readouterr().err.startswith("eval: error: ")


@pytest.mark.parametrize("key", [field for field in score("m", "gsm8k", [1]) if field != "stderr"])
@pytest.mark.parametrize(
    "value", [None, [], {}, math.nan, math.inf, -1e308, "\x1b[31m<script>", 10**400], ids=range(8)
)
def test_figures_of_other_types(key, value, first, tmp_path):
    """Every value of a score replaced by what it cannot be."""
    write(tmp_path / "second", ["other"], changed("scores", 0, key, value=value))
    with pytest.raises(EvalError):
        compare.read_runs([first, tmp_path / "second"])


@pytest.mark.parametrize(
    "key", ["data", "versions", "scores", "protocol", "schema_version", "means", "comparisons", "models"]
)
@pytest.mark.parametrize("value", [None, [], {}, "x", 1, [[1]], {"sets": 1}, {"sets": {"gsm8k": 1, "boolq": []}}])
def test_documents_of_other_types(key, value, first, tmp_path):
    """Either one message, or a part that the comparison does not read."""
    write(tmp_path / "second", ["other"], changed(key, value=value))
    try:
        compare.compared(compare.read_runs([first, tmp_path / "second"]))
    except EvalError:
        return
    assert key in ("versions", "means", "comparisons", "models")


@pytest.mark.parametrize("key", ["model", "task", "seed", "row", "repeat", "metrics"])
@pytest.mark.parametrize("value", [None, [], {}, 1.5, True, "\x1b[31m", {"acc": "1"}, {"acc": None}, {"acc": 7.0}])
def test_samples_of_other_types(key, value, first, tmp_path):
    lines = [sample("other", t, row, float(v)) for t in ROWS for row, v in enumerate(VALUES["other"][t])]
    lines[0][key] = value
    write(tmp_path / "second", ["other"], samples=lines)
    with pytest.raises(EvalError):
        compare.read_runs([first, tmp_path / "second"])


def test_samples_of_another_run(first, tmp_path):
    """Missing, short, of other values, twice: the figures are not theirs."""
    lines = [sample("other", t, row, float(v)) for t in ROWS for row, v in enumerate(VALUES["other"][t])]
    wrong = [{**line, "metrics": {"acc": 1 - line["metrics"]["acc"]}} for line in lines]
    cases = [(lines[1:], "samples.jsonl is not that of"), (wrong, "samples.jsonl is not that of"),
             ([], "is not that of"), ([*lines, lines[0]], "stands in this file twice")]  # fmt: skip
    for samples, message in cases:
        write(tmp_path / "second", ["other"], samples=samples)
        with pytest.raises(EvalError, match=message):
            compare.read_runs([first, tmp_path / "second"])
    (tmp_path / "second" / results.SAMPLES_FILE).unlink()
    with pytest.raises(EvalError, match="run the evaluation with --log-samples"):
        compare.read_runs([first, tmp_path / "second"])


def test_values_by_question_are_those_of_the_samples(tmp_path, capsys):
    write(tmp_path / "run", ["base", "mine"])
    assert rows.main([str(tmp_path / "run")]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["answers"]["mine"]["gsm8k"] == {"metric": "acc", "values": VALUES["mine"]["gsm8k"], "n_cut": 0}
    assert (list(made["answers"]), made["versions"]) == (["base", "mine"], {"vllm": "0.32.0"})
    assert rows.main([str(tmp_path / "none")]) == 2
    assert "eval_results.json: cannot be read" in capsys.readouterr().err
