"""Commands of the package that the board runs: one at a time, aborted, and ended with the board."""

import os
import signal
import subprocess
import sys

import pytest

from llamafactory_adaptive import __version__
from llamafactory_adaptive.bridge.board import command as command_module
from llamafactory_adaptive.bridge.board.command import BusyError, Command
from tests.helpers.processes import alive, wait_until_ended


def _running(code, monkeypatch):
    def start(folder, words, out, err):
        command = [sys.executable, "-I", "-c", code]
        return subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)

    monkeypatch.setattr(command_module, "_start", start)
    monkeypatch.setattr(command_module, "_LOOK_SECONDS", 0.05)


ENDLESS = "import sys, time\nprint('begun', file=sys.stderr, flush=True)\ntime.sleep(600)"


def test_a_command_of_this_package_is_run_and_what_it_says_is_shown():
    *_, last = Command().run(["--version"])
    assert (last.code, last.ended, last.said) == (0, "", __version__)


def test_a_command_can_be_aborted_and_only_one_runs(monkeypatch):
    _running(ENDLESS, monkeypatch)
    command = Command()
    steps = command.run([])
    while "begun" not in next(steps).complained:
        pass
    assert command.busy
    with pytest.raises(BusyError):
        next(command.run([]))
    process = command._process
    command.abort()
    *_, last = steps
    assert last.ended == "aborted"
    assert process.poll() is not None
    assert not command.busy


def test_a_command_that_takes_too_long_is_ended(monkeypatch):
    _running(ENDLESS, monkeypatch)
    *_, last = Command(longest=0.0).run([])
    assert (last.ended, last.code != 0) == ("too_long", True)


def test_a_command_ends_when_nobody_looks_any_more(monkeypatch):
    _running(ENDLESS, monkeypatch)
    command = Command()
    steps = command.run([])
    next(steps)
    process = command._process
    steps.close()
    assert process.poll() is not None
    assert not command.busy


def test_of_a_progress_bar_the_last_state_is_shown(monkeypatch):
    _running("print('  0%\\r 50%\\r100%\\ndone', end='')", monkeypatch)
    *_, last = Command().run([])
    assert last.said == "100%\ndone"


# Its standard output is a full pipe that it holds itself, so that it would wait for ever.
PARENT = """
import os, sys
from llamafactory_adaptive.bridge.board.command import _start
full = os.open(sys.argv[2], os.O_RDWR | os.O_NONBLOCK)
try:
    while os.write(full, b"."):
        pass
except BlockingIOError:
    os.set_blocking(full, True)
process = _start(sys.argv[1], ["--version"], full, 2)
print(process.pid, flush=True)
process.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_ends_with_a_board_that_is_killed(number, tmp_path):
    output, pipe = tmp_path / "output", tmp_path / "pipe"
    output.mkdir()
    os.mkfifo(pipe)
    board = subprocess.Popen([sys.executable, "-c", PARENT, output, pipe], stdout=subprocess.PIPE)
    with board, board.stdout:
        pid = int(board.stdout.readline())
        assert alive(pid)
        board.send_signal(number)
        board.wait(30)
        wait_until_ended([pid])
    assert not output.exists()


def test_a_board_that_ends_kills_a_command_that_does_not(monkeypatch):
    _running(f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{ENDLESS}", monkeypatch)
    monkeypatch.setattr(command_module, "_END_SECONDS", 0.05)
    command = Command()
    steps = command.run([])
    while "begun" not in next(steps).complained:
        pass
    process = command._process
    command.close()
    assert process.poll() == -signal.SIGKILL
