"""Wrong settings are told all at once, before anything starts, each with what to do instead."""

import json
import shutil
import socket
import subprocess
import sys

import pytest

from eval import run
from eval.arguments import parse
from eval.errors import UsageError
from tests.helpers.processes import ROOT


@pytest.fixture
def words(model, rows, tmp_path):
    def make(*more, protocol="llm_adapters", out="out"):
        folders = ["--base", str(model), "--data-dir", str(rows), "--out", str(tmp_path / out)]
        return [*folders, "--protocol", protocol, *more]

    return make


def problems(words):
    with pytest.raises(UsageError) as caught:
        parse(words)
    return str(caught.value)


def test_a_plain_request(words, model, adapter):
    request = parse(words("--adapter", f"a={adapter}", "--merged", f"a={model}", "--seeds", "3,1,3", "--limit", "2"))
    assert [(m.name, m.kind) for m in request.models] == [("base", "base"), ("a", "adapter"), ("a", "merged")]
    assert [task.name for task in request.tasks] == ["gsm8k", "boolq", "arc_easy", "arc_challenge"]
    assert (request.seeds, request.limit, request.decoding.num_beams, request.template) == ((3, 1), 2, 1, "none")
    assert request.server.offline  # all is local: nothing is looked up on the hub


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "gsm8"], "--tasks: 'gsm8' is no task of llm_adapters: aqua, arc_challenge, arc_easy, boolq, "
         "copa, gsm8k; did you mean gsm8k?"),
        (["--tasks", "gsm8k,gsm8k"], "--tasks: gsm8k is named 2 times"),
        (["--tasks", ","], "--tasks: none is named; try gsm8k,boolq,arc_easy,arc_challenge"),
        (["--adapter", "x"], "--adapter x: it must be NAME=DIR"),
        (["--adapter", "a b=/x"], "--adapter a b=/x: it must be NAME=DIR"),
        (["--merged", "base=/x"], "--merged base=/x: the name base is taken; use another one"),
        (["--adapter", "a=/nowhere"], "--adapter a=/nowhere: there is no adapter_config.json in that folder; give the "
         "output_dir of a training run"),
        (["--merged", "a=/nowhere"], "--merged a=/nowhere: there is no config.json in that folder; give the "
         "export_dir of a merge"),
        (["--limit", "0"], "--limit: 0 is invalid: must be at least 1"),
        (["--num-beams", "65"], "--num-beams: 65 is invalid: must be between 1 and 64"),
        (["--seeds", "1,x"], "--seeds: '1,x' is invalid: must be whole numbers from 0 to 4294967295, "
         "comma separated; try 1,2,3"),
        (["--port", "70000"], "--port: 70000 is invalid: must be between 1 and 65535"),
        (["--startup-timeout", "0"], "--startup-timeout: 0.0 is invalid: must be above 0"),
        (["--base-url", "localhost:8000"], "--base-url: localhost:8000 is no URL; try http://127.0.0.1:8000"),
        (["--base-url", "http://me:s@x"], "--base-url: an address with a user or a password is not possible"),
        (["--base-url", "http://x", "--port", "9"], "are for a server we start; leave them out"),
        (["--train-file", "/nowhere.jsonl"], "--train-file: /nowhere.jsonl does not exist"),
        (["--dataset-dir", "/x"], "give --plan too"),
        (["--server-args", "--x 'y"], "--server-args: this is no command line (No closing quotation)"),
        (["--server-args", "--port 9"], "--port would undo what the harness sets (--port); use the harness's --port"),
        (["--server-args=--served_model_name=x"], "names come from --base, --adapter and --merged"),
        (["--server-args=--trust-remote"], "code that comes with a model is never run"),
        (["--split", "test"], "gsm8k/test.jsonl, which does not exist"),
    ],
)  # fmt: skip
def test_each_problem_by_its_words(more, message, words):
    assert message in problems(words(*more))


def test_all_problems_come_at_once(words):
    text = problems(words("--limit", "0", "--tasks", "x", "--adapter", "y"))
    assert text.startswith("3 problems:\n  1. --limit")


def test_a_base_that_is_no_checkpoint(words, tmp_path):
    assert f"--base {tmp_path}: there is no config.json in that folder" in problems(words("--base", str(tmp_path)))


def test_an_adapter_of_too_high_a_rank(words, adapter):
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 600}))
    assert "its largest rank 600 is above 512, the most vLLM serves; give --merged" in problems(
        words("--adapter", f"a={adapter}")
    )
    (adapter / "adapter_config.json").write_text("{}")
    assert "its adapter_config.json cannot be read (r is None: a rank must be a whole number from 1)" in problems(
        words("--adapter", f"a={adapter}")
    )
    (adapter / "adapter_model.safetensors").unlink()
    assert "there are no weights (*.safetensors)" in problems(words("--adapter", f"a={adapter}"))


def test_results_are_never_overwritten(words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval_results.json").touch()
    assert "holds results already, nothing was overwritten; try another folder" in problems(words())


def test_boolq_without_passages_is_refused_where_the_passage_is_shown(words, rows):
    path = rows / "boolq" / "dev.jsonl"
    path.write_text('{"question": "is it", "answer": true}\n')
    message = problems(words(protocol="lm_eval"))
    assert f"{path}:1: boolq of lm_eval needs the field passage; lm_eval's BoolQ shows the passage. Try " in message
    assert "--tasks boolq_no_passage" in message
    parse(words("--tasks", "boolq", protocol="llm_adapters"))
    parse(words("--tasks", "boolq_no_passage", protocol="lm_eval"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "dev.jsonl:2: this line is not JSON"),
        ("[1]", "dev.jsonl:2: a row must be a JSON object, this is list"),
        ('{"question": "q"}', "dev.jsonl:2: arc_easy of llm_adapters needs the field choices"),
    ],
)
def test_a_bad_line_is_named(line, message, words, rows, capsys):
    path = rows / "arc_easy" / "dev.jsonl"
    path.write_text(path.read_text().splitlines()[0] + "\n" + line + "\n")
    assert run.main(words()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "key", "value", "message"),
    [
        ("gsm8k", "answer", "about five", "answer ends in 'about five': it must end in '#### N', N a number"),
        ("gsm8k", "answer", "#### nan", "answer ends in '#### nan': it must end in"),
        ("boolq", "answer", "maybe", "answer is 'maybe': it must be true or false (1 or 0)"),
        ("arc_easy", "answerKey", "D", "answerKey is 'D': it must be one of the labels A, B, C"),
        ("arc_easy", "choices", {"text": ["x"]}, "choices must hold two lists of texts, text and label"),
        ("aqua", "correct", "F", "correct is 'F': it must be one of A, B, C, D, E"),
        ("copa", "question", "why", "question is 'why': it must be cause or effect"),
        ("copa", "label", 2, "label is 2: it must be 0 or 1"),
    ],
)
@pytest.mark.parametrize("protocol", ["lm_eval", "llm_adapters"])
def test_a_value_that_cannot_be_scored_is_named(task, key, value, message, protocol, words, rows):
    path = rows / task / "dev.jsonl"
    row = json.loads(path.read_text().splitlines()[0]) | {key: value}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    assert f"{path}:6: {task} of {protocol} cannot be scored: {message}" in problems(
        words("--tasks", task, protocol=protocol)
    )


def test_a_folder_that_cannot_be_made_is_told_first(words, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run.main(words(out="file/out")) == 2
    told = capsys.readouterr()
    assert f"--out: {tmp_path}/file/out cannot be made (Not a directory); give" in told.err
    assert told.out == ""


def test_an_empty_file_is_no_data(words, rows):
    (rows / "arc_easy" / "dev.jsonl").write_text("\n")
    assert "holds no rows" in problems(words())


def test_examples_need_training_rows(words, rows):
    shutil.move(rows / "gsm8k" / "train.jsonl", rows / "gsm8k" / "other.jsonl")
    assert "gsm8k/train.jsonl, which does not exist" in problems(words(protocol="lm_eval"))
    parse(words())


def test_a_taken_port_is_one_line_and_exit_code_2(words, port, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert run.main(words("--port", str(port))) == 2
    assert capsys.readouterr().err.startswith(f"eval: error: --port: {port} on 127.0.0.1 cannot be used")


def test_likelihood_of_an_adapter_on_a_cpu_asks_for_the_merged_form(words, adapter, capsys, monkeypatch):
    monkeypatch.setattr("eval.run.on_cpu", lambda: True)
    assert run.main(words("--adapter", f"a={adapter}", protocol="lm_eval")) == 2
    assert "--adapter a: boolq, arc_easy, arc_challenge are scored by likelihood, and vLLM on a CPU" in (
        error := capsys.readouterr().err
    )
    assert "--merged a=DIR" in error


STOPPED_IN_THE_BACKGROUND = """
import os, signal, sys, time
from eval import run
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's background job begins
run.parse = lambda argv: None
run.run = lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))
sys.exit(run.main([]))
"""


def test_a_job_in_the_background_ends_by_sigterm_although_sigint_is_ignored():
    done = subprocess.run(
        [sys.executable, "-c", STOPPED_IN_THE_BACKGROUND], cwd=ROOT, capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Answers are kept: the same command goes on" in done.stderr
