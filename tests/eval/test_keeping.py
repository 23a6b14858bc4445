"""What was paid for is kept: answers line by line, one run to a folder, and a full disk is one sentence."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest

from eval.cache import ANSWERS_FILE, AnswerCache, key_of
from eval.errors import EvalError
from eval.output import LOCK_FILE, STATE_FILE, OutputFolder, problem_with
from tests.helpers.processes import ROOT


SECRET = "sk-THIS-IS-THE-SECRET"


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / ANSWERS_FILE
    with AnswerCache(path) as cache:
        for number in range(3):
            cache.add(f"k{number}", {"text": f"ä\n{number}"})
    return path


def held(path):
    with AnswerCache(path) as cache:
        return {key: cache[key] for key in ("k0", "k1", "k2") if key in cache}, cache.damaged


def test_answers_come_back_as_they_were(kept):
    assert held(kept) == ({f"k{n}": {"text": f"ä\n{n}"} for n in range(3)}, 0)


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_half_a_last_line_is_cut_off_and_the_next_answer_is_whole(kept, cut):
    kept.write_bytes(kept.read_bytes()[:-cut])
    assert set(held(kept)[0]) == {"k0", "k1"}
    with AnswerCache(kept) as cache:
        cache.add("k2", "again")
    assert held(kept)[0]["k2"] == "again"
    assert len(kept.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    "line", [b'{"key": "k1", "answer": 7, "check": "0"}', b"[]", b"\xff", b"{}", b"[" * 20_000, b'{"key": ["k1"], '
             b'"answer": 1, "check": "x"}', b'{"key": "k1"}'], ids=lambda line: repr(line[:30])
)  # fmt: skip
def test_a_damaged_line_costs_its_own_answer_alone(kept, line):
    lines = kept.read_bytes().splitlines()
    lines[1] = line
    kept.write_bytes(b"\n".join(lines) + b"\n")
    answers, damaged = held(kept)
    assert (set(answers), damaged) == ({"k0", "k2"}, 1)


def test_one_flipped_bit_anywhere_is_seen(kept):
    raw = kept.read_bytes()
    first = raw.index(b"\n")
    for at in range(first):
        kept.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        answers, _ = held(kept)
        assert answers.get("k0", {"text": "ä\n0"}) == {"text": "ä\n0"}


def test_what_cannot_be_written_as_utf8_is_kept_too(tmp_path):
    with AnswerCache(tmp_path / "a") as cache:
        cache.add("k0", "\ud800")
    assert held(tmp_path / "a") == ({"k0": "\ud800"}, 0)


def test_a_key_names_all_that_an_answer_depends_on():
    names = [key_of("m", {"prompt": [1, 2], "seed": 1}, 0), key_of("m", {"prompt": [1, 2], "seed": 2}, 0),
             key_of("n", {"prompt": [1, 2], "seed": 1}, 0), key_of("m", {"prompt": [1, 2], "seed": 1}, 1),
             key_of("m", {"prompt": [12], "seed": 1}, 0)]  # fmt: skip
    assert len(set(names)) == 5
    assert key_of("m", {"seed": 1, "prompt": [1, 2]}, 0) == names[0]


@contextmanager
def file_limit(size):
    """A disk on which no file can grow beyond ``size``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores SIGXFSZ: an OSError comes
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence_and_costs_no_answer_before(kept):
    with file_limit(kept.stat().st_size + 20), AnswerCache(kept) as cache, \
            pytest.raises(EvalError, match=r"cannot be written \(File too large\).* make room") as caught:  # fmt: skip
        cache.add("k3", "x" * 100)
    assert "\n" not in str(caught.value)
    assert set(held(kept)[0]) == {"k0", "k1", "k2"}
    with AnswerCache(kept) as cache:
        assert "k3" not in cache
        cache.add("k3", "x" * 100)
    with AnswerCache(kept) as cache:
        assert cache["k3"] == "x" * 100


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: folder.write_json("eval_results.json", {"a": "x" * 5000}),
        lambda folder: folder.write_text("samples.html", "x" * 5000),
        lambda folder: folder.append("samples.jsonl", [{"a": "x" * 5000}]),
        lambda folder: folder.write_picture("eval.png", lambda path: path.write_text("x" * 5000)),
    ],
)
def test_every_file_of_a_run_meets_a_full_disk_with_one_sentence(write, tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        folder.claim({"a": 1})
        with file_limit(1000), pytest.raises(EvalError, match=r"cannot be written \(File too large\); answers are"):
            write(folder)
        write(folder)  # and with room again it goes on


def test_two_runs_at_once_are_refused_by_name(tmp_path):
    with OutputFolder(tmp_path / "out"), pytest.raises(EvalError) as caught, OutputFolder(tmp_path / "out"):
        pass
    assert f"--out: {tmp_path / 'out'} is in use by process {os.getpid()} on" in str(caught.value)
    with OutputFolder(tmp_path / "out"):  # and free afterwards
        pass


def test_the_lock_of_a_killed_run_holds_nobody_up(tmp_path):
    code = (
        "import os, signal, pathlib; from eval.output import OutputFolder\n"
        f"folder = OutputFolder(pathlib.Path({str(tmp_path / 'out')!r})).__enter__(); folder.claim({{'a': 1}})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert (tmp_path / "out" / LOCK_FILE).exists()
    with OutputFolder(tmp_path / "out") as folder:
        assert folder.claim({"a": 1})


def test_another_request_does_not_go_on_with_a_run(tmp_path):
    with OutputFolder(tmp_path) as folder:
        assert not folder.claim({"limit": 1, "seeds": [1]})
        folder.write_text("eval_table.txt", "x")
    with OutputFolder(tmp_path) as folder:
        with pytest.raises(EvalError, match=r"another run that was not finished; it differs in limit, tasks\."):
            folder.claim({"limit": 2, "seeds": [1], "tasks": []})
        assert folder.claim({"limit": 1, "seeds": (1,)})
        folder.finish()
    assert "holds results already" in problem_with(tmp_path)
    with OutputFolder(tmp_path) as folder, pytest.raises(EvalError, match="holds results already"):
        folder.claim({"limit": 1, "seeds": [1]})


@pytest.mark.parametrize("name", ["samples.jsonl", ANSWERS_FILE, "samples.html", "eval_table.txt"])
def test_files_of_an_unknown_run_are_not_mixed_in(name, tmp_path):
    (tmp_path / name).touch()
    assert f"holds {name} of another run" in problem_with(tmp_path)


@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"schema_version": 9}', "[" * 20_000, "\x00", "null"],
                         ids=lambda s: s[:9])  # fmt: skip
def test_a_damaged_state_is_one_sentence(state, tmp_path):
    (tmp_path / STATE_FILE).write_text(state)
    assert f"{STATE_FILE} cannot be read or is of another version" in problem_with(tmp_path)


@pytest.mark.parametrize("name", [STATE_FILE, LOCK_FILE, "eval_results.json", ANSWERS_FILE, "samples.jsonl"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name, begun, tmp_path):
    if begun:
        with OutputFolder(tmp_path) as folder:
            folder.claim({"a": 1})
        (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert problem_with(tmp_path) == (
        f"--out: {tmp_path / name} is no regular file but a pipe or a device; give another folder"
    )


def test_a_folder_that_was_taken_away_is_not_written(tmp_path):
    with OutputFolder(tmp_path / "out") as folder:
        folder.claim({"a": 1})
        (tmp_path / "out").rename(tmp_path / "moved")
        with OutputFolder(tmp_path / "out") as other:
            other.claim({"a": 2})
            with pytest.raises(EvalError, match="taken away or replaced"):
                folder.write_text("eval_table.txt", "x")
    assert not (tmp_path / "moved" / "eval_table.txt").exists()


def test_scratch_files_of_a_kill_are_gone_when_the_run_goes_on(tmp_path):
    with OutputFolder(tmp_path) as folder:
        folder.claim({})
    for name in (".eval_results.json.77", ".samples.html.77", ".eval_scores.77.png"):
        (tmp_path / name).touch()
    with OutputFolder(tmp_path) as folder:
        folder.claim({})
    assert not list(tmp_path.glob(".*"))


def test_no_way_of_writing_lets_a_secret_through(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    said = {"a": f"x {SECRET}", SECRET: [f"Bearer {SECRET}"], "b": '"Bearer tok-123"'}
    with OutputFolder(tmp_path) as folder:
        folder.claim({"url": SECRET})
        folder.write_json("eval_results.json", said)
        folder.write_text("eval_table.txt", str(said))
        folder.append("samples.jsonl", [said])
        with AnswerCache(tmp_path / ANSWERS_FILE) as cache:
            cache.add("k", said)
        folder.finish()
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert SECRET not in text, path
        assert "tok-123" not in text, path
    assert json.loads((tmp_path / "eval_results.json").read_text())["b"] == '"Bearer ***"'
