"""A child process that ends with its parent and keeps its log to itself."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llamafactory_adaptive.bridge import child
from llamafactory_adaptive.bridge.child import Children, alone, answer_of_child, run_child
from tests.helpers.processes import alive, wait_until_ended


CHILD = """
import os, sys, time
from pathlib import Path
from llamafactory_adaptive.bridge.child import end_with_parent, read_job
assert read_job() == "the job\\n"
end_with_parent(Path(sys.argv[1]))
Path(sys.argv[2]).write_text(str(os.getpid()))
time.sleep(600)
"""
# A background job of a shell, and with it what it starts, ignores SIGINT until it asks for it again.
PARENT = """
import os, signal, sys
from pathlib import Path
from llamafactory_adaptive.bridge.child import run_child
signal.signal(signal.SIGINT, signal.default_int_handler)
run_child([sys.executable, "-c", sys.argv[1], sys.argv[2], sys.argv[3]], os.environ, Path(sys.argv[4]), "the job")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_parent_however_that_ends(number, tmp_path):
    scratch, pid = tmp_path / "scratch", tmp_path / "pid"
    scratch.mkdir()
    words = [sys.executable, "-c", PARENT, CHILD, scratch, pid, tmp_path / "log"]
    parent = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    number_of_child = int(pid.read_text())
    assert alive(number_of_child)
    parent.send_signal(number)
    parent.wait(30)
    wait_until_ended([number_of_child])
    if number != signal.SIGINT:  # there the parent, still alive, ends it and removes what is its own
        deadline = time.monotonic() + 10
        while scratch.exists():
            assert time.monotonic() < deadline, "nobody else removes this folder"
            time.sleep(0.01)


def test_its_log_goes_to_a_file_and_only_warnings_and_progress_to_the_terminal(tmp_path, capsys):
    said = ["[INFO|config.py:1] Model config {", "[WARNING|2026] llamafactory.adaptive:1 >> mind this",
            "Scoring modules: 100%|##| 2/2", "the last line"]  # fmt: skip
    command = [sys.executable, "-c", f"print({chr(10).join(said)!r}); raise SystemExit(3)"]
    code, lines = run_child(command, os.environ, tmp_path / "logs" / "log", "")
    assert code == 3
    assert lines.split("\n")[:4] == said
    assert (tmp_path / "logs" / "log").read_text().split("\n")[:4] == said
    assert capsys.readouterr().err.splitlines() == said[1:3]


def test_on_a_terminal_its_progress_is_a_bar_beneath_its_warnings(tmp_path, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    said = ["Scoring modules: 50% (1/2)", "[WARNING|2026] llamafactory.adaptive:1 >> mind this",
            "Scoring modules: 100% (2/2)"]  # fmt: skip
    command = [sys.executable, "-c", f"print({chr(10).join(said)!r})"]
    assert run_child(command, os.environ, tmp_path / "log", "")[0] == 0
    shown = stream.getvalue()
    assert f"{said[1]}\n" in shown
    assert "2/2" in shown
    assert "100% (" not in shown, "the line that the child printed"


def test_a_child_that_is_killed_has_a_negative_code_and_a_full_disk_is_no_reason_to_end(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-c", "import os; print('so far', flush=True); os.kill(os.getpid(), 9)"]
    code, lines = run_child(command, os.environ, tmp_path / "file" / "log", "")
    assert code == -signal.SIGKILL
    assert lines.startswith("so far")


WORKER = """
import os, subprocess, sys
from pathlib import Path
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
Path(sys.argv[1]).write_text(str(worker.pid))
print("so far", flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_killed_child_whose_worker_holds_its_output_is_not_waited_for_and_the_worker_ends(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path / "pid")]
    code, lines = run_child(command, os.environ, tmp_path / "log", "")
    assert (code, lines.split()) == (-signal.SIGKILL, ["so", "far"])
    wait_until_ended([int((tmp_path / "pid").read_text())])


def test_silence_is_told_of_and_ends_in_the_limit(tmp_path, monkeypatch, capsys):
    for name, seconds in (("_LOOK_SECONDS", 0.01), ("_TELL_SECONDS", 0.05), ("_SILENT_SECONDS", 0.5)):
        monkeypatch.setattr(child, name, seconds)
    command = [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(600)"]
    code, lines = run_child(command, os.environ, tmp_path / "log", "")
    assert (code, lines) == (-9, "so far")
    assert f"its log is {tmp_path / 'log'}" in capsys.readouterr().err


def in_threads(number, run):
    """Call ``run`` with each number in a thread of its own; the threads and what they return."""
    made = {}
    threads = [threading.Thread(target=lambda i=i: made.update({i: run(i)})) for i in range(number)]
    for thread in threads:
        thread.start()
    return threads, made


def wait_for_words(*logs):
    deadline = time.monotonic() + 60
    while not all(log.is_file() and log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_children_are_ended_from_another_thread_and_none_starts_afterwards(tmp_path):
    children, ended = Children(), []
    command = [sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(600)"]

    def run(number):
        ended.append(run_child(command, os.environ, tmp_path / f"log{number}", "", children))

    threads, _ = in_threads(2, run)
    wait_for_words(tmp_path / "log0", tmp_path / "log1")
    children.end()
    for thread in threads:
        thread.join(60)
    run(2)
    assert [code for code, _ in ended] == [-signal.SIGKILL] * 3


# Ends once its pipe is closed and so is that of the other child: where one is waited for first, both are killed.
PATIENT = """
import os, sys, time
from pathlib import Path
own, other = map(Path, sys.argv[1:])
print("so far", flush=True)
os.read(0, 4096)
while os.read(0, 4096):
    pass
own.touch()
while not other.exists():
    time.sleep(0.01)
"""


def test_all_children_are_told_to_end_before_any_is_waited_for(tmp_path):
    children, names = Children(), [tmp_path / "first", tmp_path / "second"]
    commands = [[sys.executable, "-c", PATIENT, *map(str, order)] for order in (names, names[::-1])]
    logs = [tmp_path / "log0", tmp_path / "log1"]
    threads, made = in_threads(2, lambda i: run_child(commands[i], os.environ, logs[i], "", children, patience=60.0))
    wait_for_words(*logs)
    children.end()
    for thread in threads:
        thread.join(60)
    assert [made[i][0] for i in range(2)] == [0, 0]


def test_a_child_that_is_asked_for_an_answer_gives_it_and_is_ended_with_the_others(tmp_path):
    children, log = Children(), tmp_path / "log"
    speak = "import sys; print('the answer'); print('a word', file=sys.stderr); raise SystemExit(3)"
    assert answer_of_child([sys.executable, "-c", speak], os.environ, 60.0, children) == (
        3,
        "the answer\n",
        "a word\n",
    )
    hang = f"import pathlib, time; pathlib.Path({str(log)!r}).write_text('so far'); time.sleep(600)"
    threads, made = in_threads(1, lambda _: answer_of_child([sys.executable, "-c", hang], os.environ, 600.0, children))
    wait_for_words(log)
    children.end()
    threads[0].join(60)
    assert made[0][0] == -signal.SIGKILL


@pytest.mark.parametrize(
    ("device", "seen"),
    [
        (None, {"CUDA_VISIBLE_DEVICES": "4", "OMP_NUM_THREADS": "6"}),
        ("5", {"CUDA_VISIBLE_DEVICES": "5", "OMP_NUM_THREADS": "6"}),
        ("cpu:2", {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}),
    ],
)
def test_a_child_sees_one_device_or_its_share_of_the_cpu_and_no_launcher(monkeypatch, device, seen):
    for name, value in {"CUDA_VISIBLE_DEVICES": "4,5", "OMP_NUM_THREADS": "6", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    environment = alone(device)
    assert {name: environment[name] for name in seen} == seen
    assert "RANK" not in environment
